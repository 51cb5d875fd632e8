"""The paper's grid on SuperNI with T5-XL: both orders, three seeds.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/paper_superni_t5_xl.py \
    --workdir=runs/studies/paper_superni_t5_xl
"""

from configs import t5_xl_superni
from configs.studies.methods import PAPER, some
from sapt_jax.study.grid import make_study


def get_config():
    c = t5_xl_superni.get_config()
    return make_study(
        c, some(c, *PAPER), {"superni_1572": "superni_1572", "superni_748": "superni_748"}, seeds=(42, 43, 44)
    )
