"""What a task's data cannot teach or show with a tokenizer and a metric, told before anything is trained."""

import numpy as np

from sapt_jax.data.encoding import Ragged
from sapt_jax.data.stream import EncodedTask
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.results.metrics import counted_as_one

# Answers of a classification task are few; of any other, some may well be near each other.
_MOST_LABELS = 100
_PARTS = ("sources", "targets")


def cautions(task: EncodedTask, tokenizer: Tokenizer) -> list[str]:
    """A line for each of: rows with tokens that the tokenizer does not know, answers that are one to it or the metric.

    Args:
      task: the task as `tokenizer` has encoded it.
    """
    return [f"{task.name}: {line}" for line in (*_unknown(task, tokenizer), *_mixed_up(task, tokenizer))]


def _unknown(task: EncodedTask, tokenizer: Tokenizer) -> list[str]:
    splits = [split for split in (task.train, task.dev, task.test) if split]
    rows = sum(map(len, splits))
    inputs, answers = (sum(_rows_with(tokenizer.unk_id, getattr(split, of)) for split in splits) for of in _PARTS)
    if not inputs and not answers:
        return []
    return [
        f"{inputs} of {rows} inputs and {answers} of {rows} answers hold characters unknown to the tokenizer, which "
        "the model can neither read nor write. Take a model whose vocabulary has them."
    ]


def _rows_with(token: int | None, rows: Ragged) -> int:
    """How many rows hold a token."""
    return len(np.unique(np.searchsorted(rows.offsets, np.flatnonzero(rows.ids == token), side="right")))


def _mixed_up(task: EncodedTask, tokenizer: Tokenizer) -> list[str]:
    answers = task.task.labels or tuple(dict.fromkeys(instance.outputs[0] for instance in task.task.train))
    if len(answers) > _MOST_LABELS:
        return []
    groups: dict[tuple[int, ...], list[str]] = {}
    for answer in answers:
        groups.setdefault(tuple(tokenizer.encode(answer)), []).append(answer)
    same = [tuple(group) for group in groups.values() if len(group) > 1]
    scored = [group for group in counted_as_one(answers, task.task.metric) if group not in same]
    return [
        *(f"the answers {_listed(group)} are the same token ids: no model can tell them apart." for group in same),
        *(
            f"the answers {_listed(group)} count as one under {task.task.metric}: giving one for another scores 100."
            for group in scored
        ),
    ]


def _listed(answers: tuple[str, ...]) -> str:
    *others, last = (repr(answer) for answer in answers[:5])
    return f"{', '.join(others)} and {last}"
