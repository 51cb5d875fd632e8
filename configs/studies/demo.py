"""All methods on the demo's six short tasks, three seeds; `make demo` runs three of them with the first seed.

python -m sapt_jax.study --config=configs/studies/demo.py --workdir=runs/studies/demo
"""

from configs import demo
from configs.methods import PRESETS
from configs.studies.methods import TRANSFER, some
from sapt_jax.study.grid import make_study


def get_config():
    c = demo.get_config()
    first = ("sapt-statistics", "sequential", "single_task")
    others = [name for name in PRESETS if name not in ("sapt", "sequential", "single_task")]
    methods = some(c, *first, *TRANSFER, "sapt-generate", "sapt-train", "sapt-none", *others)
    return make_study(c, methods, {"order1": c.task_order}, seeds=(0, 1, 2))
