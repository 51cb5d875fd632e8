"""The paper's grid on SuperNI with LLaMA-2-7B: both orders, three seeds.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/paper_superni_llama2_7b.py \
    --workdir=runs/studies/paper_superni_llama2_7b
"""

from configs import llama2_7b_superni
from configs.studies.methods import PAPER, some
from sapt_jax.study.grid import make_study


def get_config():
    c = llama2_7b_superni.get_config()
    return make_study(
        c, some(c, *PAPER), {"superni_1572": "superni_1572", "superni_748": "superni_748"}, seeds=(42, 43, 44)
    )
