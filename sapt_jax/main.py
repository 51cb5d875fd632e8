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
from sapt_jax.config import unknown_fields
from sapt_jax.storage import preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's settings, a file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, scores and logs go: a folder, gs:// or s3://.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several, as the cluster says (TPU pod, SLURM).")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT on process 0's host, where no cluster says it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes, with --coordinator.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        _join_processes()
        continual.run(_CONFIG.value, _WORKDIR.value)
    except preemption.PreemptedError as place:
        if jax.process_index() == 0:
            print(f"stopped {place}, and saved. The same command goes on from there.", file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        # What a user can mend is told without the program's own stack; --verbosity=1 shows it.
        if flags.FLAGS.verbosity > 0:
            raise
        sys.exit(f"error: {error}")


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


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, after a check of the names in --config.NAME: its own error would not be one line."""
    flag = "config."
    names = [argument.lstrip("-").split("=")[0] for argument in argv[1:] if argument.startswith("-")]
    problems = unknown_fields(name.removeprefix(flag) for name in names if name.startswith(flag))
    if problems:
        sys.exit("error: " + "\n".join(problems))
    return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
