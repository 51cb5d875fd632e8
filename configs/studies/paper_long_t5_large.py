"""The paper's grid on Long Sequence with T5-large: both orders, three seeds.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/paper_long_t5_large.py \
    --workdir=runs/studies/paper_long_t5_large
"""

from configs import t5_large_long
from configs.studies.methods import PAPER, some
from sapt_jax.study.grid import make_study


def get_config():
    c = t5_large_long.get_config()
    orders = {name: name for name in ("long_mnli", "long_yelp")}
    return make_study(c, some(c, *PAPER), orders, seeds=(42, 43, 44))
