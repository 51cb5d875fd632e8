"""Every setting at its default, as sapt_jax/config.py has it: for a run whose settings all stand on the command line.

python -m sapt_jax.main --config=configs/default.py --workdir=runs/default --config.model.path=models/t5-large
"""

from sapt_jax.config import default_config


def get_config():
    return default_config()
