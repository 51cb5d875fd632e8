"""T5 v1.1 XL (3B) on the 15 tasks of Long Sequence, with the paper's settings.

A TPU VM of 8 chips (v5e-8), or one GPU of 40 GB or more.

hf download google/t5-v1_1-xl --local-dir models/t5-v1_1-xl
export SAPT_DATA_DIR=/path/to/data
python -m sapt_jax.main --config=configs/t5_xl_long.py --workdir=runs/t5_xl_long

The other order, or another size: --config=configs/t5_xl_long.py:order=long_mnli,size=base
"""

from configs import paper


def get_config(argument: str = ""):
    c = paper.long_t5(argument, size="xl")
    # Every device holds the weights (6 GB) and recomputes the activations of its share of the rows.
    c.model.remat = "full"
    return c
