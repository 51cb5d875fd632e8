"""Every setting at its default, as sapt_jax/config.py has it: for a run whose settings all stand on the command line.

python -m sapt_jax.main --config=configs/default.py --config.model.path=models/t5-large --workdir=runs/default
"""

from sapt_jax.config import default_config


def get_config():
    return default_config()
