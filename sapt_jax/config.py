"""Checks of a run's config: fields that exist, values that make sense, and the same run on resume."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath

from configs import common
from sapt_jax.methods.sapt import LEARNING, SELECTION
from sapt_jax.models.families import DTYPES
from sapt_jax.models.kernels import KERNELS
from sapt_jax.optimization import SCHEDULES
from sapt_jax.pseudo_samples.read import PSEUDO_SOURCES
from sapt_jax.results.metrics import REFERENCE_CHOICES
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically

POSITIVE = (
    "pet.rank",
    "pet.alpha",
    "pet.prompt_length",
    "attention.query_hidden",
    "attention.temperature",
    "pseudo_samples.batch_size",
    "pseudo_samples.generator.rank",
    "pseudo_samples.generator.alpha",
    "pseudo_samples.generator.steps",
    "pseudo_samples.generator.batch_size",
    "pseudo_samples.generator.max_length",
    "pseudo_samples.generator.temperature",
    "pseudo_samples.generator.top_p",
    "pseudo_samples.generator.draws",
    "data.max_buckets",
    "data.source_multiple",
    "data.target_multiple",
    "train.epochs",
    "train.batch_size",
    "train.accumulation",
    "train.eval_every_epochs",
    "train.log_every_steps",
    "optimizer.max_grad_norm",
    "eval.batch_size",
    "eval.max_new_tokens",
    "eval.beams",
)
NOT_NEGATIVE = (
    "kl_ratio",
    "pet.capacity",
    "pseudo_samples.ratio",
    "pseudo_samples.minimum",
    "data.dev_size",
    "data.max_train",
    "data.max_dev",
    "data.max_test",
    "train.max_steps",
    "train.patience",
    "train.checkpoint_every_steps",
    "optimizer.learning_rate",
    "pseudo_samples.generator.learning_rate",
    "pseudo_samples.generator.top_k",
    "attention.warm_start_steps",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
)
# Settings that would otherwise be found wrong only after the run has begun.
CHOICES = {
    "pseudo_samples.source": PSEUDO_SOURCES,
    "pet.kind": ("lora", "prompt"),
    "attention.learning": LEARNING,
    "attention.selection": SELECTION,
    "model.dtype": tuple(DTYPES),
    "model.param_dtype": tuple(DTYPES),
    "model.attention": KERNELS,
    "optimizer.schedule": SCHEDULES,
    "eval.references": REFERENCE_CHOICES,
}
# What may differ between two starts of one run: where things lie, how often it reports, how it computes, and a longer
# task order.
FREE_ON_RESUME = (
    "task_order",
    "disabled_tasks",
    "data_dir",
    "data.prefetch_threads",
    "data.prefetch_batches",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "eval.batch_size",
    "eval.unseen_tasks",
    "eval.single_task_runs",
    "model.remat",
    "model.attention",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.rules",
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.seed": 0, ...} of a ConfigDict or nested dict."""
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        nested = hasattr(value, "items")
        flat.update(flatten(value, f"{path}.") if nested else {path: value})
    return flat


def unknown_fields(names: Iterable[str]) -> list[str]:
    """A sentence for each of the dotted names that `configs/common.py` does not have, with the nearest that it has."""
    known = flatten(common.get_config())
    problems = []
    for name in sorted(set(names) - known.keys()):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"config.{name} is not a setting." + (f" Did you mean config.{near[0]}?" if near else ""))
    return problems


def check_config(config: Any) -> None:
    """Checks field names against `configs/common.py`, ranges, and choices.

    Raises:
      ValueError: lists every field at fault and what to do.
    """
    known, given = flatten(common.get_config()), flatten(config)
    problems = unknown_fields(given)
    problems += [f"config.{name} is missing; configs/common.py has it." for name in sorted(known.keys() - given.keys())]
    for names, valid, wanted in (
        (POSITIVE, lambda x: x > 0, "positive"),
        (NOT_NEGATIVE, lambda x: x >= 0, "not negative"),
    ):
        problems += [
            f"config.{name}={given[name]} must be {wanted}."
            for name in names
            if name in given and (given[name] is None or not valid(given[name]))
        ]
    problems += [
        f"config.{name}={given[name]!r} is unknown; choose one of {', '.join(choices)}."
        for name, choices in CHOICES.items()
        if name in given and given[name] not in choices
    ]
    if not problems and config.train.batch_size % config.train.accumulation:
        problems.append(
            f"config.train.batch_size={config.train.batch_size} is not a multiple of "
            f"config.train.accumulation={config.train.accumulation}: choose one that is."
        )
    if problems:
        raise ValueError("\n".join(problems))


def record_config(config: Any, workdir: epath.Path) -> None:
    """Writes WORKDIR/config.json, what `check_same_run` compares with."""
    if jax.process_index() == 0:
        write_text_atomically(workdir / "config.json", json.dumps(to_jsonable(flatten(config)), indent=1) + "\n")


def check_same_run(config: Any, workdir: epath.Path) -> None:
    """Compares the config with the one that started the run in `workdir`, if there is one.

    Raises:
      ValueError: lists every field that differs and would change what was already computed.
    """
    file = workdir / "config.json"
    now = to_jsonable(flatten(config))
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        differ = [
            f"config.{name}: {before.get(name)!r} before, {now.get(name)!r} now"
            for name in sorted(before.keys() | now.keys())
            if name not in FREE_ON_RESUME and before.get(name) != now.get(name)
        ]
        if differ:
            raise ValueError(
                f"{workdir} holds a run with other settings. Use a new --workdir, or the same settings.\n  "
                + "\n  ".join(differ)
            )
