"""SAPT with one of its parts left out, as a delta on another config; by default T5-large without ARM.

python -m sapt_jax.main --config=configs/ablations.py --workdir=runs/without_arm
python -m sapt_jax.main --config=configs/ablations.py:name=mean_attention,of=smollm2_superni --workdir=runs/mean
"""

import importlib

from configs import paper

ABLATIONS = {
    # Nothing holds the attention of earlier tasks in place.
    "without_arm": {"sapt.kl_ratio": 0.0},
    # Each task learns its block alone, at weight 1. Its key then learns from the warm start, not from the task.
    "without_attentive_learning": {"sapt.learning": "own", "sapt.warm_start_steps": 100},
    # Blocks learn under the attention, and are mixed alike at test time.
    "without_attentive_selection": {"sapt.selection": "mean"},
    # Blocks are mixed alike in training and at test time.
    "mean_attention": {"sapt.learning": "mean", "sapt.selection": "mean"},
}


def get_config(argument: str = ""):
    chosen = paper.parse_argument(argument, name="without_arm", of="t5_large_superni")
    if chosen["name"] not in ABLATIONS:
        raise ValueError(f"the config's argument name={chosen['name']!r} is unknown; choose {', '.join(ABLATIONS)}.")
    c = importlib.import_module(f"configs.{chosen['of']}").get_config()
    c.update_from_flattened_dict(ABLATIONS[chosen["name"]])
    return c
