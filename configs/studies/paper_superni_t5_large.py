"""The paper's grid on SuperNI with T5-large: both orders, three seeds.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/paper_superni_t5_large.py \
    --workdir=runs/studies/paper_superni_t5_large
"""

from configs import t5_large_superni
from configs.studies.methods import paper_grid


def get_config():
    return paper_grid(t5_large_superni.get_config())
