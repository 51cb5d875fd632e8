"""What a page tells of a run beside its figures: settings, protocol, labels, scores and warnings."""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import numpy as np
from ml_collections import ConfigDict

from sapt_jax.config import SETTINGS, flatten, idle_sections, make_method
from sapt_jax.methods import Method
from sapt_jax.recorded_config import upgrade
from sapt_jax.results.labels import format_bytes
from sapt_jax.results.record import Record, number, padded
from sapt_jax.results.terminal import METRIC_NAMES, SUMMARY_MEANINGS, format_duration, format_score
from sapt_jax.storage.text_files import to_jsonable


def settings_of(record: Record) -> dict[str, Any]:
    """The run's settings by today's names; empty where no file of the run has them."""
    written = record.config or flatten(record.scores.get("config") or {})
    return upgrade(written) if written else {}


def model_name(settings: Mapping[str, Any]) -> str:
    """What a run's base model is called: the end of its path, or its variant."""
    path = str(settings.get("model.path") or "").rstrip("/")
    return path.rsplit("/", 1)[-1].removeprefix("pypi:") or str(settings.get("model.variant") or "unknown model")


def changed(settings: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, value, default, what it is) of the settings that differ from the defaults; other methods' are left out."""
    idle = idle_sections(settings.get("method"))
    rows = []
    for name in sorted(settings, key=lambda name: ("." in name, name)):
        if name.startswith(idle):
            continue
        default = to_jsonable(SETTINGS[name].default) if name in SETTINGS else None
        if to_jsonable(settings[name]) != default:
            text = SETTINGS[name].text if name in SETTINGS else "a setting that this version does not know"
            rows.append((name, _shown(settings[name]), _shown(default), text))
    return rows


def protocol(record: Record) -> list[tuple[str, str]]:
    """What every score depends on beside model and training."""
    return [(name, _shown(value)) for name, value in (record.scores.get("protocol") or {}).items()]


def labels(record: Record) -> list[tuple[str, str]]:
    """What the method was told, saw and keeps, and what it took; what the run did not write down is said to be so."""
    found, routing = record.labels, record.scores.get("routing")
    told = found.get("needs_task_id", (record.scores.get("protocol") or {}).get("needs_task_id"))
    unknown = "not written down by this run"
    seconds, peak = record.seconds, record.peak_bytes
    accuracy = routing.get("accuracy") if isinstance(routing, Mapping) else None
    return [
        ("told the task of a test input", unknown if told is None else "yes" if told else "no"),
        ("old data seen while later tasks train", _old_data(found) or unknown),
        ("kept from task to task", _size(found.get("bytes"), found.get("parameters")) or unknown),
        ("routing accuracy", unknown if accuracy is None else f"{number(accuracy):.1%}"),
        ("seconds", unknown if math.isnan(seconds.sum()) or not len(seconds) else format_duration(seconds.sum())),
        ("peak memory", unknown if math.isnan(peak) else format_bytes(int(peak))),
    ]


def summary(record: Record) -> list[tuple[str, str, str]]:
    """(measure, value, what it means), over the tasks that are finished."""
    found = record.scores.get("summary") or {}
    return [
        (name, format_score(number(found.get(name)), 1), SUMMARY_MEANINGS[name])
        for name in SUMMARY_MEANINGS
        if name in found
    ]


def metric_names(record: Record) -> str:
    """What the scores are, in a sentence."""
    metrics = set((record.scores.get("metric_per_task") or {}).values())
    names = sorted(METRIC_NAMES.get(name, str(name)) for name in metrics)
    return f"Scores are {' or '.join(names)} in percent." if names else ""


def warnings_of(record: Record, settings: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before trusting the figures."""
    return [*record.gaps, *_cut_rows(record), *_rejected(record), *_method_warnings(record, settings), *_beside(record)]


def _cut_rows(record: Record) -> Iterator[str]:
    for name, counts in (record.scores.get("truncated") or {}).items():
        prompts, answers = _two_counts(counts)
        if prompts or answers:
            yield f"{name}: {prompts:.0f} prompts and {answers:.0f} answers were cut to the longest length."


def _rejected(record: Record) -> Iterator[str]:
    counts: collections.Counter[str] = collections.Counter()
    for quality in record.samples().values():
        reasons = quality.get("rejected")
        for reason, count in reasons.items() if isinstance(reasons, Mapping) else ():
            counts[str(reason)] += int(np.nan_to_num(number(count)))
    if counts:
        named = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        yield f"{counts.total()} texts that the model wrote as pseudo-samples were rejected: {named}."


def _method_warnings(record: Record, settings: Mapping[str, Any]) -> Iterator[str]:
    """What the method itself finds in the last logs of each task, such as a slot that inputs never reach."""
    method = _method(settings)
    for index, name in enumerate(record.tasks):
        logged = record.logged("train", index)
        last = logged[-1] if logged else {}
        logs = {key: np.array(value, np.float64) for key, value in last.items() if _numeric(value)}
        try:
            warning = method.warning(logs, method.slot_index(index)) if method and logs else None
        except (KeyError, IndexError):
            # An older run's logs lack what today's warning looks at.
            warning = None
        if warning:
            yield f"{name}: {warning}"


def _beside(record: Record) -> Iterator[str]:
    """Scores of other ways to test the same run, in folders of their own."""
    for file in sorted(record.workdir.glob("*/scores.json")):
        yield f"{file.parent.name}/ holds the scores of another way to test this run; name that folder to see it."


def _method(settings: Mapping[str, Any]) -> Method | None:
    try:
        return make_method(ConfigDict(flax.traverse_util.unflatten_dict(dict(settings), sep=".")))
    except (ValueError, KeyError, TypeError, AttributeError):
        # A method or a value of another version.
        return None


def _numeric(value: Any) -> bool:
    flat = value if isinstance(value, list) else [value]
    return bool(flat) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in flat)


def _old_data(found: Mapping[str, Any]) -> str:
    if "old_data" not in found:
        return ""
    rows = number(found.get("rows"))
    return f"{found['old_data']}" + (f", {rows:,.0f} rows" if rows > 0 else "")


def _size(in_bytes: Any, parameters: Any) -> str:
    size, count = number(in_bytes), number(parameters)
    if math.isnan(size):
        return ""
    return format_bytes(int(size)) + ("" if math.isnan(count) else f", {count:,.0f} parameters")


def _two_counts(counts: Any) -> tuple[float, float]:
    """Two counts of a list; 0 for what is none."""
    first, second = np.nan_to_num(padded(counts if isinstance(counts, list) else (), 2))
    return float(first), float(second)


def _shown(value: Any) -> str:
    value = to_jsonable(value)
    return "–" if value is None else '""' if value == "" else str(value)
