"""WORKDIR/config.json, the settings that a run was started with: older names understood, and the same on resume."""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sapt_jax.config import RENAMED, SETTINGS, flatten, idle_sections
from sapt_jax.storage.text_files import to_jsonable, write_text_atomically

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
    factors = {
        pattern: now.pop(name) / now["optimizer.learning_rate"]
        for name, pattern in _RATES_BEFORE.items()
        if now.get(name) is not None
    }
    if factors:
        now["optimizer.rates"] = (*factors.items(), (".*", 1.0))
    options = {option: now[name] for name, option in _OPTIONS_BEFORE.items() if name in now}
    if options:
        now["optimizer.options"] = tuple((k, v) for k, v in options.items() if _ADAMW.get(k) != v)
    for name in (*_RATES_BEFORE, *_OPTIONS_BEFORE):
        now.pop(name, None)
    return now


def record_config(config: ConfigDict, workdir: epath.Path) -> None:
    """Writes WORKDIR/config.json, what `check_same_run` compares with."""
    if jax.process_index() == 0:
        write_text_atomically(workdir / "config.json", json.dumps(to_jsonable(flatten(config)), indent=1) + "\n")


def check_same_run(config: ConfigDict, workdir: epath.Path) -> None:
    """Compares the config with the one that started the run in `workdir`, if there is one.

    Raises:
      ValueError: lists every field that differs and would change what was already computed.
    """
    file = workdir / "config.json"
    if not file.is_file():
        return
    before, now = to_jsonable(upgrade(json.loads(file.read_text(encoding="utf-8")))), to_jsonable(flatten(config))
    idle = idle_sections(now["method"])
    differ = [
        f"config.{name}: {before.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if not (name in SETTINGS and SETTINGS[name].free)
        and not name.startswith(idle)
        and before.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds a run with other settings. Use a new --workdir, or the same settings.\n  "
            + "\n  ".join(differ)
        )
