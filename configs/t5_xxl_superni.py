"""T5 v1.1 XXL (11B) on the 15 tasks of SuperNI, with the paper's settings.

A TPU VM of 8 chips (v5e-8), or a node of 4 or more GPUs.

hf download google/t5-v1_1-xxl --local-dir models/t5-v1_1-xxl
export SAPT_DATA_DIR=/path/to/data
python -m sapt_jax.main --config=configs/t5_xxl_superni.py --workdir=runs/t5_xxl_superni

The other order, or another size: --config=configs/t5_xxl_superni.py:order=superni_748,size=base
"""

from configs import paper


def get_config(argument: str = ""):
    c = paper.superni_t5(argument, size="xxl")
    # The weights (23 GB) are spread over all devices, and activations are recomputed.
    c.model.remat = "full"
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
