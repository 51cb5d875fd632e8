"""Teaches a model a sequence of tasks.

    python -m sapt_jax.main --config=configs/smollm2_superni.py --workdir=runs/smollm2

Any setting is changed with --config.NAME=VALUE. The same command again goes on where a stopped run left off.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sapt_jax import continual
from sapt_jax.config import unknown_fields

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's settings, a file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, scores and logs go.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One process of several: a TPU pod slice, SLURM or several hosts."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()
    try:
        continual.run(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # What a user can mend is told without the program's own stack; --verbosity=1 shows it.
        if flags.FLAGS.verbosity > 0:
            raise
        sys.exit(f"error: {error}")


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
