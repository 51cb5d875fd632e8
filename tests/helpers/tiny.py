"""A run that ends within a minute: a tiny LLaMA with random weights, byte tokens, three short tasks as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sapt_jax.config import default_config
from sapt_jax.methods import METHODS, Method
from sapt_jax.pet import Lora

TASKS = {
    "shout": str.upper,
    "mirror": lambda text: text[::-1],
    "first": lambda text: text[0],
    "last": lambda text: text[-1],
}
ORDER = ("shout", "mirror", "first")


def write_tasks(folder: Path, tasks: Sequence[str] = ORDER, train: int = 20, test: int = 5, seed: int = 0) -> Path:
    """Writes the folders of `tasks` (names in `TASKS`) with `train` and `test` rows each, and returns `folder`."""
    for index, name in enumerate(tasks):
        rng = np.random.default_rng([seed, index])
        (folder / name).mkdir(parents=True)
        (folder / name / "definition.txt").write_text(f"{name} it.", encoding="utf-8")
        for split, rows in (("train", train), ("test", test)):
            texts = ["".join(rng.choice(list("abcd"), rng.integers(2, 13))) for _ in range(rows)]
            lines = [json.dumps({"input": text, "output": TASKS[name](text)}) + "\n" for text in texts]
            (folder / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def tiny_method(name: str = "sapt", **fields: Any) -> Method:
    """A method of the registry at a tiny size; `fields` are those that a test cares for."""
    sizes = {"sapt": {"query_hidden": 6, "kl_ratio": 1.0, "reflection_batch": 2, "warm_start_learning_rate": 1e-2}}
    return METHODS[name](**{"pet": Lora(rank=2, alpha=8.0), **sizes.get(name, {}), **fields})


def tiny_config(data_dir: str | Path, **overrides: Any) -> ConfigDict:
    """A tiny run over the tasks in `data_dir`; overrides are `**{"train.epochs": 2}`, as on the command line."""
    c = default_config()
    c.benchmark = "own"
    c.data_dir = str(data_dir)
    c.task_order = ",".join(ORDER)
    c.model.variant = "llama-tiny"
    c.model.tokenizer = "bytes"
    c.model.dtype = c.model.param_dtype = "float32"
    c.pet.rank = 2
    c.sapt.query_hidden = 8
    c.pseudo_samples.source = "train"
    c.sapt.reflection_batch = 4
    c.data.max_source_length = 48
    c.data.max_target_length = 16
    c.data.dev_size = 4
    c.data.max_buckets = 1
    c.train.epochs = 2
    c.train.batch_size = 8
    c.train.eval_every_epochs = 1
    c.train.log_every_steps = 2
    c.train.checkpoint_every_steps = 0
    c.train.figures = False
    c.optimizer.learning_rate = 1e-2
    c.eval.batch_size = 8
    c.eval.max_new_tokens = 8
    c.update_from_flattened_dict(overrides)
    return c
