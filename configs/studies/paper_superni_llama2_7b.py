"""The paper's grid on SuperNI with LLaMA-2-7B: both orders, three seeds.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/paper_superni_llama2_7b.py \
    --workdir=runs/studies/paper_superni_llama2_7b
"""

from configs import llama2_7b_superni
from configs.studies.methods import paper_grid


def get_config():
    return paper_grid(llama2_7b_superni.get_config())
