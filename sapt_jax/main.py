"""Teaches a model a sequence of tasks.

    python -m sapt_jax.main --config=configs/smollm2_superni.py --workdir=runs/smollm2

Any setting is changed with --config.NAME=VALUE. The same command again goes on where a stopped run left off, killed or
asked to stop by SIGTERM, at which a run saves first.

A run on several hosts is started on each of them: with --distributed where the cluster says who they are (TPU pods,
SLURM, Kubernetes, Open MPI), else with --coordinator, --num_processes and --process_id.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sapt_jax import continual
from sapt_jax.command_line import parse_flags, told_in_one_line
from sapt_jax.storage import preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's settings, a file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, scores and logs go: a folder, gs:// or s3://.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several, as the cluster says (TPU pod, SLURM).")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on process 0's host, where no cluster says it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes, with --coordinator.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # With --verbosity=1 the program's own stack is shown.
    with told_in_one_line(verbose=flags.FLAGS.verbosity > 0):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}. Settings are --config.NAME=VALUE.")
        try:
            _join_processes()
            continual.run(_CONFIG.value, _WORKDIR.value)
        except preemption.PreemptedError as place:
            if jax.process_index() == 0:
                print(f"stopped {place}, and saved. The same command goes on from there.", file=sys.stderr)
            sys.exit(preemption.EXIT_CODE)


def _join_processes() -> None:
    """Joins the other processes of the run, and lets SIGTERM stop it where that loses nothing."""
    explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if any(value is not None for value in explicit):
        if None in explicit:
            raise ValueError("--coordinator, --num_processes and --process_id go together: set all three.")
        jax.distributed.initialize(*explicit)
    elif _DISTRIBUTED.value:
        jax.distributed.initialize()
    else:
        preemption.watch()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
