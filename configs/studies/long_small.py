"""SmolLM2-135M on the first eight tasks of Long Sequence's second order (long_mnli), rows cut for two CPU cores.

SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/long_small.py \
    --workdir=runs/studies/long_small
"""

from configs import smollm2_superni
from configs.studies.methods import some
from sapt_jax.data.benchmarks import TASK_ORDERS
from sapt_jax.study.grid import make_study


def get_config():
    c = smollm2_superni.get_config()
    c.benchmark = "long_sequence"
    c.pseudo_samples.dir = "lora_gen_long_llama"
    c.eval.max_new_tokens = 8
    names = ("sapt-statistics", "sequential", "single_task", "epi", "o_lora")
    return make_study(c, some(c, *names), {"order2": ",".join(TASK_ORDERS["long_mnli"][:8])}, seeds=(0,))
