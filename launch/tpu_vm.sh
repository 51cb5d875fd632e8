#!/usr/bin/env bash
# A run on a Cloud TPU slice of one host or many. Every worker runs the same command; JAX finds the others.
#
#   launch/tpu_vm.sh create                        makes the slice
#   launch/tpu_vm.sh install                       copies this repository's HEAD to every worker and installs it
#   launch/tpu_vm.sh run [--config.NAME=VALUE ...] starts the run on every worker; it outlives the connection
#   launch/tpu_vm.sh logs                          follows the output of the first worker
#   launch/tpu_vm.sh resume [same arguments]       goes on after a stop; a preempted slice is made anew first
#   launch/tpu_vm.sh delete                        gives the slice back
#
# Set the variables in the environment: NAME=mine TYPE=v6e-8 launch/tpu_vm.sh create
set -euo pipefail

NAME="${NAME:-sapt}"
PROJECT="${PROJECT:-}"                      # empty: gcloud's own setting
ZONE="${ZONE:-us-east5-a}"
TYPE="${TYPE:-v5p-16}"                      # v5p-16 has 8 chips on 2 hosts
RUNTIME="${RUNTIME:-v2-alpha-tpuv5}"        # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e
SPOT="${SPOT:-1}"                           # 0: a slice that is not preempted, at the full price
CONFIG="${CONFIG:-configs/t5_xl_superni.py}"
WORKDIR="${WORKDIR:-}"                      # for run and resume; all workers must see it: a bucket or a shared disk
DATA_DIR="${DATA_DIR:-}"                    # SAPT_DATA_DIR on the workers

tpu() {
  local action="$1"
  shift
  gcloud compute tpus tpu-vm "$action" "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

on_workers() {
  tpu ssh "$NAME" --worker="$1" --command="$2"
}

create() {
  local spot=()
  [[ "$SPOT" == 0 ]] || spot=(--spot)
  tpu create "$NAME" --accelerator-type="$TYPE" --version="$RUNTIME" "${spot[@]}"
}

install() {
  archive="$(mktemp)"
  trap 'rm -f "$archive"' EXIT
  git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$NAME:sapt_jax.tar.gz" --worker=all
  # The images have an older Python; uv brings the one that is needed.
  on_workers all 'set -e
    mkdir -p sapt_jax && tar -xzf sapt_jax.tar.gz -C sapt_jax && cd sapt_jax
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt "jax[tpu]"'
}

run() {
  if [[ -z "$WORKDIR" ]]; then
    echo "error: WORKDIR is empty: name a folder that all workers see" >&2
    exit 2
  fi
  local command=(.venv/bin/python -m sapt_jax.main --distributed --config="$CONFIG" --workdir="$WORKDIR" "$@")
  [[ -z "$DATA_DIR" ]] || command=(env SAPT_DATA_DIR="$DATA_DIR" "${command[@]}")
  # The lock lasts as long as the run, so that a second one cannot start beside it.
  on_workers all "cd sapt_jax
    if ! flock --nonblock run.lock true; then echo 'error: a run is going on' >&2; exit 1; fi
    nohup flock run.lock $(printf '%q ' "${command[@]}")>> run.log 2>&1 < /dev/null &"
}

resume() {
  local state
  state="$(tpu describe "$NAME" --format='value(state)' || true)"
  case "$state" in
    READY) ;;
    "" | PREEMPTED | TERMINATED | STOPPED)
      [[ -z "$state" ]] || tpu delete "$NAME" --quiet
      create
      install
      ;;
    *)
      echo "error: $NAME is $state: wait until it is READY" >&2
      exit 1
      ;;
  esac
  run "$@"
}

case "${1:-}" in
  create | install) "$1" ;;
  run | resume) "$@" ;;
  logs) on_workers 0 'tail -n 100 -f sapt_jax/run.log' ;;
  delete) tpu delete "$NAME" ;;
  *)
    sed -n '2,/^set/{/^#/p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
