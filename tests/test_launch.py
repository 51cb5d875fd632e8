"""The launch scripts, run with stand-ins for gcloud and Slurm that note what they are called with."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCRIPTS = ("tpu_vm.sh", "slurm.sbatch", "slurm_study.sbatch")
# What a shell would split, expand or run if it were not quoted.
AWKWARD = ["--config.task_order=one task,it's two", '--config.note=$HOME `id` "; touch sapt_was_here', "--config.x=*"]

NOTE = """#!/usr/bin/env bash
{ printf '%s\\0' "$(basename "$0")" "$@"; printf '\\1\\0'; } >> "$CALLS"
"""
GCLOUD = (
    NOTE
    + """
case "$4" in
  describe) [[ -n "$STATE" ]] && echo "$STATE" ;;
  scp) cp "$5" "$WORKER/sapt_jax.tar.gz" ;;
  ssh) for word in "$@"; do
    if [[ "$word" == --command=* ]]; then cd "$WORKER" && exec bash -c "${word#--command=}"; fi
  done ;;
esac
"""
)


class Stage:
    """A folder with stand-ins first in PATH, and what they were called with."""

    def __init__(self, folder):
        self.folder, self.calls_file, self.worker = folder, folder / "calls", folder / "worker"
        (folder / "bin").mkdir()
        self.worker.mkdir()
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "WORKER": str(self.worker),
            "STATE": "READY",
            "WORKDIR": "gs://bucket/my runs/t5",
        }

    def stand_in(self, name, text=NOTE, under="bin"):
        file = self.folder / under / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def start(self, script, *arguments, **environment):
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script, *arguments, **environment):
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self):
        """[[program, argument, ...], ...] since the last time."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return [call.split("\0")[:-1] for call in text.split("\1\0")[:-1]]

    def has_called(self, start):
        """Whether the last call began so, and was noted to its end."""
        text = self.calls_file.read_text()
        return text.endswith("\1\0") and text[:-2].rpartition("\1\0")[2].startswith(start)

    def wait_for(self, condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path)
    stage.stand_in("gcloud", GCLOUD)
    stage.stand_in("python", under="worker/sapt_jax/.venv/bin")
    return stage


def tpu(action, name, *arguments, end=("--zone=us-east5-a",)):
    return ["gcloud", "compute", "tpus", "tpu-vm", action, name, *arguments, *end]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-test.txt")
    result = subprocess.run([shellcheck, "--shell=bash", LAUNCH / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_tpu_create_and_delete(stage):
    assert stage.run(LAUNCH / "tpu_vm.sh", "create")[0] == 0
    assert stage.calls() == [tpu("create", "sapt", "--accelerator-type=v5p-16", "--version=v2-alpha-tpuv5", "--spot")]
    changed = {"NAME": "mine", "TYPE": "v6e-8", "RUNTIME": "r", "ZONE": "z", "SPOT": "0", "PROJECT": "a project"}
    end = ("--zone=z", "--project=a project")
    assert stage.run(LAUNCH / "tpu_vm.sh", "create", **changed)[0] == 0
    assert stage.run(LAUNCH / "tpu_vm.sh", "delete", **changed)[0] == 0
    assert stage.calls() == [
        tpu("create", "mine", "--accelerator-type=v6e-8", "--version=r", end=end),
        tpu("delete", "mine", end=end),
    ]


def test_tpu_run_passes_every_argument_on(stage):
    code, _, error = stage.run(
        LAUNCH / "tpu_vm.sh", "run", *AWKWARD, CONFIG="configs/a b.py:order=c,protocol=d", DATA_DIR="/my data"
    )
    assert (code, error) == (0, "")
    stage.wait_for(lambda: stage.has_called("python\0-m\0sapt_jax.main\0"))
    gcloud, python = stage.calls()
    assert gcloud[:6] == tpu("ssh", "sapt", end=()) and gcloud[6] == "--worker=all" and gcloud[-1].startswith("--zone=")
    assert python == [
        *("python", "-m", "sapt_jax.main", "--distributed", "--config=configs/a b.py:order=c,protocol=d"),
        *("--workdir=gs://bucket/my runs/t5", *AWKWARD),
    ]
    assert not list(stage.folder.rglob("sapt_was_here"))


def test_tpu_run_needs_a_workdir(stage):
    code, _, error = stage.run(LAUNCH / "tpu_vm.sh", "run", WORKDIR="")
    assert code == 2 and "WORKDIR is empty" in error and stage.calls() == []


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_tpu_run_does_not_start_twice(stage):
    stage.stand_in("python", NOTE + 'echo "$SAPT_DATA_DIR"\nread -r < go\n', under="worker/sapt_jax/.venv/bin")
    go = stage.worker / "sapt_jax/go"
    os.mkfifo(go)
    log = stage.worker / "sapt_jax/run.log"
    assert stage.run(LAUNCH / "tpu_vm.sh", "run", DATA_DIR="/my data")[0] == 0
    stage.wait_for(lambda: log.read_text() == "/my data\n")  # it runs on after the connection ended
    code, _, error = stage.run(LAUNCH / "tpu_vm.sh", "run")
    assert code == 1 and "a run is going on" in error
    go.write_text("\n")
    stage.wait_for(lambda: stage.run(LAUNCH / "tpu_vm.sh", "resume")[0] == 0)
    go.write_text("\n")


def repository(folder):
    """A repository with the script in it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (folder / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_vm.sh", folder / "launch")
    (folder / "requirements.txt").write_text("jax\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run(git + words, check=True)
    (folder / "untracked").write_text("")
    return folder / "launch" / "tpu_vm.sh"


def test_tpu_install(stage):
    script = repository(stage.folder / "a checkout")
    stage.stand_in("python3")
    code, _, error = stage.run(script, "install")
    assert code == 0, error
    copy, gcloud, *python = stage.calls()
    assert copy == tpu("scp", copy[5], "sapt:sapt_jax.tar.gz", "--worker=all")
    assert not Path(copy[5]).exists(), "the archive is left behind"
    with tarfile.open(stage.worker / "sapt_jax.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["launch", "launch/tpu_vm.sh", "requirements.txt"]
    assert (stage.worker / "sapt_jax/requirements.txt").exists()
    assert gcloud[4:7] == ["ssh", "sapt", "--worker=all"]
    assert [call[:4] for call in python] == [
        ["python3", "-m", "pip", "install"],
        ["python3", "-m", "uv", "venv"],
        ["python3", "-m", "uv", "pip"],
    ]
    assert python[2][-3:] == ["-r", "requirements.txt", "jax[tpu]"]


@pytest.mark.parametrize(
    ("state", "actions"),
    (
        ("READY", ["describe", "ssh"]),
        ("PREEMPTED", ["describe", "delete", "create", "scp", "ssh", "ssh"]),
        ("", ["describe", "create", "scp", "ssh", "ssh"]),
        ("CREATING", ["describe"]),
    ),
)
def test_tpu_resume(stage, state, actions):
    stage.stand_in("python3")
    script = repository(stage.folder / "checkout")
    code, _, error = stage.run(script, "resume", *AWKWARD, STATE=state)
    assert code == (state == "CREATING"), error
    assert ("wait until it is READY" in error) == (state == "CREATING")
    if state != "CREATING":
        stage.wait_for(lambda: stage.has_called("python\0-m\0sapt_jax.main\0"))
    calls = stage.calls()
    assert [call[4] for call in calls if call[0] == "gcloud"] == actions
    if state != "CREATING":
        assert calls[-1][-3:] == AWKWARD
    if state == "PREEMPTED":
        assert "--quiet" in calls[1]


def test_tpu_usage(stage):
    code, _, error = stage.run(LAUNCH / "tpu_vm.sh", "fly")
    assert code == 2 and "launch/tpu_vm.sh resume" in error and stage.calls() == []


SLURM = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8", "PYTHON": "my env/bin/python", "WORKDIR": "/shared/my runs"}


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head = text[: text.index("\nset -euo pipefail")]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.MULTILINE))
    assert text.count("#SBATCH") == len(options), "Slurm reads no directive after the first command"
    # JAX takes one device for each of Slurm's processes.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "B:USR1@300" and options["requeue"] == "" and options["open-mode"] == "append"


@pytest.mark.parametrize("status", (0, 3))
def test_slurm_runs_one_command(stage, status):
    stage.stand_in("srun", NOTE + f"exit {status}\n")
    code, _, error = stage.run(LAUNCH / "slurm.sbatch", *AWKWARD, **SLURM)
    assert code == status, error
    assert stage.calls() == [
        [
            *("srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "my env/bin/python", "-m", "sapt_jax.main"),
            *("--distributed", "--config=configs/t5_xl_superni.py", "--workdir=/shared/my runs", *AWKWARD),
        ]
    ]


def test_slurm_without_a_workdir(stage):
    stage.stand_in("srun")
    code, _, error = stage.run(LAUNCH / "slurm.sbatch", **SLURM | {"WORKDIR": ""})
    assert code != 0 and "WORKDIR" in error and stage.calls() == []


def test_slurm_stops_at_the_time_limit_and_queues_again(stage):
    """The steps are told to end, take their time to save, and only then does the job go back."""
    stage.stand_in(
        "srun", NOTE + "trap 'sleep 0.3; echo saved; exit 143' TERM\necho $$ > pid\nwhile :; do sleep 0.05; done\n"
    )
    stage.stand_in("scancel", NOTE + 'kill -TERM "$(cat pid)"\n')
    stage.stand_in("scontrol")
    process = stage.start(LAUNCH / "slurm.sbatch", **SLURM)
    stage.wait_for(lambda: (stage.folder / "pid").exists() and (stage.folder / "pid").read_text().strip())
    process.send_signal(signal.SIGUSR1)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143 and out == "saved\n", error
    assert [call for call in stage.calls() if call[0] != "srun"] == [
        ["scancel", "--signal=TERM", "42"],
        ["scontrol", "requeue", "42"],
    ]


ARRAY = {
    "SLURM_ARRAY_JOB_ID": "42",
    "SLURM_ARRAY_TASK_ID": "6",
    "SLURM_ARRAY_TASK_MIN": "4",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "WORKDIR": "/shared/my study",
}


def test_slurm_array_takes_its_part_of_a_study_and_queues_it_again_at_the_limit(stage):
    waits = "trap 'sleep 0.3; echo saved; exit 143' TERM\necho $$ > pid\nwhile :; do sleep 0.05; done\n"
    python = stage.stand_in("my python", NOTE + waits)
    stage.stand_in("scontrol")
    process = stage.start(LAUNCH / "slurm_study.sbatch", "--only=sapt*", **ARRAY, PYTHON=str(python))
    stage.wait_for(lambda: (stage.folder / "pid").exists() and (stage.folder / "pid").read_text().strip())
    process.send_signal(signal.SIGUSR1)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143 and out == "saved\n", error
    study = ["-m", "sapt_jax.study", "--config=configs/studies/paper_superni_t5_large.py", "--workdir=/shared/my study"]
    assert stage.calls() == [
        ["my python", *study, "--shard=2/3", "--only=sapt*"],
        ["scontrol", "requeue", "42_6"],
    ]


# What the manifests are filled with, other than what the comment says of it.
GKE = {
    "NAME": "mine",
    "IMAGE": "registry/image",
    "ACCELERATOR": "an-accelerator",
    "TOPOLOGY": "2x4",
    "HOSTS": "3",
    "CHIPS": "5",
    "CLAIM": "a-claim",
    "CONFIG": "configs/t5_tiny.py",
    "WORKDIR": "/data/runs/tiny",
}


def gke(text):
    """The manifests with GKE's values for the variables that the comment sets."""
    told = re.findall(r'^#   export (\w+)="[^"]+"', text, re.MULTILINE)
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(told)
    values = {name: GKE[name] for name in told}
    return list(yaml.safe_load_all(re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)))


@pytest.mark.parametrize("accelerator", ("tpu", "gpu"))
def test_gke_manifests(accelerator):
    text = (LAUNCH / "gke.yaml").read_text()
    if accelerator == "gpu":
        text = re.sub(r"^ *cloud.google.com/gke-tpu.*\n|^ *google.com/tpu.*\n", "", text, flags=re.MULTILINE)
        text = text.replace("# GPU: ", "").replace("#   export TOPOLOGY", "#")
    account, role, binding, jobset = gke(text)
    assert (account["kind"], account["metadata"]["name"]) == ("ServiceAccount", "mine")
    # What jax's Kubernetes detection asks for.
    allowed = {(rule["apiGroups"][0], name) for rule in role["rules"] for name in rule["resources"]}
    assert allowed == {("", "pods"), ("", "services"), ("batch", "jobs")}
    assert all(rule["verbs"] == ["get", "list"] for rule in role["rules"])
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]

    # The fields of the JobSet API (jobset.x-k8s.io/v1alpha2) and of a Job; the API server refuses any other.
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    assert jobset["spec"]["failurePolicy"].keys() == {"maxRestarts"}
    (hosts,) = jobset["spec"]["replicatedJobs"]
    assert hosts.keys() == {"name", "replicas", "template"} and hosts["replicas"] == 1
    job = hosts["template"]["spec"]
    assert job.keys() == {"completionMode", "completions", "parallelism", "backoffLimit", "template"}
    assert job["completions"] == job["parallelism"] == 3
    # One pod that fails stops its Job at once; the JobSet starts all of them anew.
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == account["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["command"] + container["args"] == [
        *("python", "-m", "sapt_jax.main", "--distributed"),
        *("--config=configs/t5_tiny.py", "--workdir=/data/runs/tiny"),
    ]
    device, label = {
        "tpu": ("google.com/tpu", "cloud.google.com/gke-tpu-accelerator"),
        "gpu": ("nvidia.com/gpu", "cloud.google.com/gke-accelerator"),
    }[accelerator]
    assert container["resources"]["limits"] == {device: 5}
    assert pod["nodeSelector"][label] == "an-accelerator"
    topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology")
    assert topology == ("2x4" if accelerator == "tpu" else None)
    assert container["image"] == "registry/image"
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "a-claim"}}]
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {"SAPT_DATA_DIR": "/data"}
    names = [hosts["name"], container["name"]]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) for name in names)
