"""LLaMA-2-13B on the 15 tasks of Long Sequence, with the paper's settings.

8 TPU chips or 4 GPUs of 40 GB.

hf download meta-llama/Llama-2-13b-hf --local-dir models/llama-2-13b
export SAPT_DATA_DIR=/path/to/data
python -m sapt_jax.main --config=configs/llama2_13b_long.py --workdir=runs/llama2_13b_long

The other order, or the other size: --config=configs/llama2_13b_long.py:order=long_yelp,size=7b
"""

from configs import paper


def get_config(argument: str = ""):
    return paper.long_llama(argument, size="13b")
