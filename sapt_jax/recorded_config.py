"""What a run has recorded of itself: its settings, older names understood, and what lay where they point.

    WORKDIR/config.json      every setting by its dotted name; scores.json has them too, once a task is learned
    WORKDIR/contents.json    fingerprints, by the setting that names the place: of weights, tokenizer and pools

A place may be another one in a later call, where what lies there is the same.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sapt_jax.config import RENAMED, SETTINGS, flatten, idle_sections
from sapt_jax.results.scores import read_scores
from sapt_jax.settings import shown
from sapt_jax.storage.task_folders import begun_tasks
from sapt_jax.storage.text_files import read_json, to_jsonable, write_text_atomically

CONFIG, CONTENTS = "config.json", "contents.json"

_RATES_BEFORE = {
    "optimizer.key_learning_rate": "selector/key",
    "optimizer.query_projection_learning_rate": "selector/query_projection/.*",
}
_OPTIONS_BEFORE = {"optimizer.beta1": "b1", "optimizer.beta2": "b2", "optimizer.epsilon": "eps"}
_OPTIONS_BEFORE |= {"optimizer.weight_decay": "weight_decay"}
_ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def upgrade(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The flat config of a run as this version names it; settings that it lacks have their defaults."""
    now = {name: row.default for name, row in SETTINGS.items()}
    now |= {RENAMED.get(name, name): value for name, value in flat.items()}
    if now["method"] == "seq_lora":
        now["method"] = "sequential"
    peak = now["optimizer.learning_rate"]
    factors = {
        pattern: now.pop(name) / peak
        for name, pattern in _RATES_BEFORE.items()
        if isinstance(now.get(name), int | float) and isinstance(peak, int | float) and peak
    }
    if factors:
        now["optimizer.rates"] = (*factors.items(), (".*", 1.0))
    options = {option: now[name] for name, option in _OPTIONS_BEFORE.items() if name in now}
    if options:
        now["optimizer.options"] = tuple((k, v) for k, v in options.items() if _ADAMW.get(k) != v)
    for name in _OPTIONS_BEFORE:
        now.pop(name, None)
    for name in _RATES_BEFORE:
        if now.get(name) is None:
            now.pop(name, None)
    return now


def record_config(config: ConfigDict, workdir: epath.Path) -> None:
    """Writes WORKDIR/config.json, what `check_same_run` compares with."""
    if jax.process_index() == 0:
        write_text_atomically(workdir / CONFIG, json.dumps(to_jsonable(flatten(config)), indent=1) + "\n")


def read_recorded(workdir: epath.Path) -> dict[str, Any] | None:
    """The settings of the run in a workdir, as this version names them; None where there is no run.

    Raises:
      ValueError: they are broken, or gone although tasks are there.
    """
    file = workdir / CONFIG
    if file.exists():
        return upgrade(read_json(file, "Put a whole copy back; where there is a scores.json, delete it: that will do."))
    if (workdir / "scores.json").exists():
        return upgrade(flatten(read_scores(workdir)["config"]))
    if tasks := begun_tasks(workdir):
        raise ValueError(
            f"{workdir} holds {tasks[0][2].name} of a run, but neither {CONFIG} nor scores.json, which say with what "
            "settings. Put one of them back, or take a new --workdir."
        )
    return None


def check_same_run(config: ConfigDict, workdir: epath.Path) -> None:
    """Compares the config with the one that started the run in `workdir`, if there is one.

    Raises:
      ValueError: lists every field that differs and would change what was already computed; or from `read_recorded`.
    """
    recorded = read_recorded(workdir)
    if recorded is None:
        return
    before, now = to_jsonable(recorded), to_jsonable(flatten(config))
    idle, places = idle_sections(now["method"]), read_contents(workdir)
    differ = [
        f"config.{name}: {shown(before.get(name))} before, {shown(now.get(name))} now"
        for name in sorted(before.keys() | now.keys())
        if not (name in SETTINGS and SETTINGS[name].free)
        and not name.startswith(idle)
        and name not in places
        and before.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds a run with other settings. Use a new --workdir, or the same settings.\n  "
            + "\n  ".join(differ)
        )


def read_contents(workdir: epath.Path) -> dict[str, Any]:
    """Fingerprints of what a run has read, by the setting that names the place; {} where none are recorded.

    Raises:
      ValueError: the file is broken.
    """
    file = workdir / CONTENTS
    return read_json(file, "Delete it, and places are compared by their names.") if file.exists() else {}


def record_contents(contents: Mapping[str, Any], workdir: epath.Path) -> None:
    """Writes WORKDIR/contents.json."""
    if jax.process_index() == 0:
        write_text_atomically(workdir / CONTENTS, json.dumps(contents, indent=1) + "\n")


def check_same_contents(contents: Mapping[str, Any], config: ConfigDict, workdir: epath.Path) -> None:
    """Compares fingerprints with those that the run in `workdir` began with, of several tasks those that both have.

    Raises:
      ValueError: names every setting whose place holds something else.
    """
    before, flat = read_contents(workdir), flatten(config)
    differ = []
    for name, fingerprint in before.items():
        now = contents.get(name)
        if isinstance(fingerprint, dict) and isinstance(now, dict):
            both = fingerprint.keys() & now.keys()
            fingerprint, now = ({task: of[task] for task in both} for of in (fingerprint, now))
        if now != fingerprint:
            differ.append(f"config.{name}={shown(flat.get(name))} is not what this run began with")
    if differ:
        raise ValueError(
            f"{workdir} holds a run that read other files. Give the same ones, wherever they lie, or a new --workdir."
            "\n  " + "\n  ".join(differ)
        )
