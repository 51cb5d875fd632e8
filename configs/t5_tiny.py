"""A random T5 of 100,000 parameters on four short SuperNI tasks: the whole run on a CPU within minutes, to see it work.

export SAPT_DATA_DIR=/path/to/data
python -m sapt_jax.main --config=configs/t5_tiny.py --workdir=runs/t5_tiny

The same tasks in another order: --config=configs/t5_tiny.py:order=superni_748 (all 15) or a list of names set with
--config.task_order=task875,task363
"""

from configs import paper
from sapt_jax.config import default_config


def get_config(argument: str = ""):
    chosen = paper.parse_argument(argument, order="", size="tiny")
    c = default_config()
    c.task_order = chosen["order"] or "task363,task1687,task875,task1510"
    c.model.variant = f"t5-{chosen['size']}"
    c.model.tokenizer = "bytes"
    c.model.dtype = "float32"
    c.model.param_dtype = "float32"
    c.sapt.query_hidden = 16
    # One byte is one id.
    c.data.max_source_length = 256
    c.data.max_target_length = 16
    c.data.max_train = 64
    c.data.max_dev = 8
    c.data.max_test = 16
    c.data.max_buckets = 2
    c.train.epochs = 2
    c.train.batch_size = 8
    c.train.eval_every_epochs = 1
    c.optimizer.learning_rate = 3e-3
    c.eval.batch_size = 16
    c.eval.max_new_tokens = 8
    return c
