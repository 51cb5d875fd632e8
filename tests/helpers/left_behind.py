"""Workdirs as runs leave them, written without training: any number of tasks, methods, seeds and gaps, in no time."""

import json
from pathlib import Path

import numpy as np

from sapt_jax.config import default_config, flatten, protocol_of
from sapt_jax.results.metrics import finished_part, summarise
from sapt_jax.results.predictions import predictions_file
from sapt_jax.results.scores import Scores, write_scores
from sapt_jax.storage.text_files import to_jsonable

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028 & \"quotes\" 'too' ${x} 日本語"


def write_run(
    workdir: Path, tasks: tuple[str, ...] = ("shout", "mirror", "first"), *, finished: int | None = None, **overrides
) -> Path:
    """Writes what a run of `tasks` leaves once `finished` of them are (all by default), from a seed of its own.

    Overrides are settings by dotted name, and `rows` (of a test file), `steps` (of a task), `matrix`, `attention`
    (whether it is there), `text` (put into every input and answer) and `extra` (fields of scores.json).
    """
    rows, steps = overrides.pop("rows", 6), overrides.pop("steps", 12)
    text, attention = overrides.pop("text", ""), overrides.pop("attention", True)
    matrix, extra = overrides.pop("matrix", None), overrides.pop("extra", {})
    count, finished = len(tasks), len(tasks) if finished is None else finished
    config = default_config()
    config.update_from_flattened_dict({"benchmark": "own", "task_order": ",".join(tasks), **overrides})
    rng = np.random.default_rng([config.seed, len(config.method), count])
    forgets = {"sapt": 0.5, "sequential": 9.0}.get(config.method, 4.0)
    if matrix is None:
        learned = rng.uniform(40, 95, count)
        ages = np.arange(count)[:, None] - np.arange(count)[None]
        matrix = np.clip(learned - forgets * ages + rng.normal(0, 2, (count, count)), 0, 100)
        matrix[(ages < 0) | (np.arange(count)[:, None] >= finished)] = np.nan
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_jsonable(flatten(config))))
    own = _attention(rng, count)
    with (workdir / "metrics.jsonl").open("w") as out:
        for index, name in enumerate(tasks[: finished + 1]):
            for record in _curve(rng, own[index], index, steps, attention):
                out.write(json.dumps({"kind": "train", "task_index": index, "task": name, **record}) + "\n")
            for step in (steps // 2, steps):
                score = {"score": float(rng.uniform(40, 90)), "best": 90.0}
                out.write(json.dumps({"kind": "dev", "task_index": index, "task": name, "step": step, **score}) + "\n")
    for index in range(finished):
        for tested in range(index + 1):
            file = Path(predictions_file(workdir, tasks, index, tested))
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(
                    {
                        "id": f"{tested}-{row}",
                        "input": f"say {row} {text}",
                        "prediction": f"answer {row if row % 2 else index} {text}",
                        "references": [f"answer {row} {text}"],
                        "score": 100.0 if row % 2 else 0.0,
                        "attention_weights": rng.dirichlet(0.05 + 20 * own[tested]).tolist() if attention else None,
                    },
                    ensure_ascii=False,
                )
                for row in range(rows)
            ]
            file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    if finished:
        summary = summarise(finished_part(matrix), None)
        extra = {"unseen": {}, "truncated": dict.fromkeys(tasks, (0, 0)), "single_task_scores": {}, **extra}
        seeds = {"seed": config.seed, "data.seed": 0}
        metric = dict.fromkeys(tasks, "rouge_l")
        write_scores(
            workdir,
            Scores(config.method, tasks, metric, matrix, summary, seeds, protocol_of(config), config, extra),
        )
    return workdir


def write_quality(workdir: Path, index: int, name: str, **fields) -> None:
    """What the writer of pseudo-samples left of a task."""
    quality = {"copies": 0.0, "definition_kept": 1.0, "distinct_1": 0.6, "distinct_2": 0.9, "real_distinct_1": 0.5}
    quality |= {
        "real_distinct_2": 0.8,
        "words": 11.0,
        "real_words": 12.5,
        "attention_kl": 0.3,
        "real_attention_kl": 0.1,
    }
    quality |= {"wanted": 20, "rejected": {"no end": 7}}
    folder = workdir / "tasks" / f"{index:02d}-{name}" / "generated_data" / name
    folder.mkdir(parents=True)
    (folder / "quality.json").write_text(json.dumps(quality | fields))


def _attention(rng, count):
    """[T, T] of each task on the slots that there are."""
    mixed = rng.dirichlet(np.full(count, 0.3), count) * 0.3 + 0.7 * np.eye(count)
    return mixed / mixed.sum(axis=1, keepdims=True)


def _curve(rng, own, index, steps, attention):
    for step in range(2, steps + 1, 2):
        share = step / steps
        now = share * own + (1 - share) / len(own)
        now[index + 1 :] = 0
        far = rng.exponential(0.05, len(own)) * (np.arange(len(own)) < index)
        yield {
            "step": step,
            "loss": float(3 * np.exp(-3 * share) + rng.uniform(0.1, 0.3)),
            "task_loss": float(3 * np.exp(-3 * share) + 0.1),
            "grad_norm": float(rng.lognormal()),
            "tokens": 240.0,
            "reflection_loss": float(far.sum()),
            "reflection_by_task": far.tolist(),
            **({"attention": (now / now.sum()).tolist()} if attention else {}),
        }
