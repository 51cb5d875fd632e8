"""The data of a page's browser of predictions: a fair, small part of a run's answers, and how each changed."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sapt_jax.results.record import Record, number

# Letters of a text that are shown.
_INPUT, _ANSWER = 500, 200
_ROWS_OF_A_TASK = 60


def browser_data(record: Record, budget: int) -> dict[str, Any]:
    """Answers after the last finished task, in at most about `budget` bytes.

    Returns:
      tasks: names. rows: of every task in turn, each with t (task), i (input), r (references), a (attention in
      percent, or null) and h: [after task, answer, score] wherever the answer changed. shown, of: how many answers
      these are, of how many.
    """
    tested = record.tested
    by_task = [_rows(record, index) for index in range(len(tested))]
    total = sum(count for count, _ in by_task)
    # In turn, so that what does not fit is left out of all tasks alike.
    queues = [rows for _, rows in by_task]
    kept, size = [], 0
    for place in range(max(map(len, queues), default=0)):
        for rows in queues:
            if place < len(rows):
                size += len(json.dumps(rows[place]))
                if size <= budget:
                    kept.append(rows[place])
    kept.sort(key=lambda row: row["t"])
    return {"tasks": list(tested), "rows": kept, "shown": len(kept), "of": total}


def _rows(record: Record, tested: int) -> tuple[int, list[dict[str, Any]]]:
    """How many answers there are on a task, and some of them, evenly spread over its test set."""
    last = record.finished - 1
    final = record.answers(last, tested) if last >= 0 else []
    if not final:
        return 0, []
    places = np.unique(np.linspace(0, len(final) - 1, min(len(final), _ROWS_OF_A_TASK)).round().astype(int))
    first = min(tested, last)
    earlier = [record.answers(index, tested) for index in range(first, last)]
    rows = [
        _row(
            tested,
            [
                *((stage, answers[at]) for stage, answers in enumerate(earlier, first) if at < len(answers)),
                (last, final[at]),
            ],
        )
        for at in places
    ]
    return len(final), rows


def _row(tested: int, stages: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    history: list[tuple[int, str, float]] = []
    for stage, answer in stages:
        score = number(answer.get("score"))
        shown = (stage, _cut(answer.get("prediction"), _ANSWER), None if np.isnan(score) else round(score, 1))
        if not history or history[-1][1:] != shown[1:]:
            history.append(shown)
    _, final = stages[-1]
    weights = final.get("attention_weights")
    references = final.get("references")
    return {
        "t": tested,
        "i": _cut(final.get("input"), _INPUT),
        "r": [_cut(text, _ANSWER) for text in (references if isinstance(references, list) else [references])[:5]],
        "a": [int(round(100 * np.nan_to_num(number(x)))) for x in weights] if isinstance(weights, list) else None,
        "h": history,
    }


def _cut(text: Any, most: int) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= most else text[: most - 1] + "…"
