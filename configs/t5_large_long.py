"""T5-large on the 15 tasks of Long Sequence, with the paper's settings.

One GPU of 24 GB or more, or one TPU host.

hf download google-t5/t5-large --local-dir models/t5-large
export SAPT_DATA_DIR=/path/to/data
python -m sapt_jax.main --config=configs/t5_large_long.py --workdir=runs/t5_large_long

The other order, or another size: --config=configs/t5_large_long.py:order=long_mnli,size=base
"""

from configs import paper


def get_config(argument: str = ""):
    c = paper.long_t5(argument, size="large")
    # A fourth of the rows at a time, and no activations but matrix products: one GPU of 24 GB. The released protocol's
    # loss depends on how they are split.
    if c.train.loss_mean == "tokens":
        c.train.accumulation = 4
    c.model.remat = "dots"
    return c
