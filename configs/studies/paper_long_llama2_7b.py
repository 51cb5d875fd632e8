"""The paper's grid on Long Sequence with LLaMA-2-7B: both orders, three seeds.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/paper_long_llama2_7b.py \
    --workdir=runs/studies/paper_long_llama2_7b
"""

from configs import llama2_7b_long
from configs.studies.methods import PAPER, some
from sapt_jax.study.grid import make_study


def get_config():
    c = llama2_7b_long.get_config()
    orders = {name: name for name in ("long_mnli", "long_yelp")}
    return make_study(c, some(c, *PAPER), orders, seeds=(42, 43, 44))
