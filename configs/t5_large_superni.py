"""T5-large on the 15 tasks of SuperNI, with the paper's settings.

One GPU of 24 GB or more, or one TPU host.

hf download google-t5/t5-large --local-dir models/t5-large
export SAPT_DATA_DIR=/path/to/data
python -m sapt_jax.main --config=configs/t5_large_superni.py --workdir=runs/t5_large_superni

The other order, or another size: --config=configs/t5_large_superni.py:order=superni_748,size=base
"""

from configs import paper


def get_config(argument: str = ""):
    c = paper.superni_t5(argument, size="large")
    # A fourth of the rows at a time, and no activations but matrix products: one GPU of 24 GB.
    c.train.accumulation = 4
    c.model.remat = "dots"
    return c
