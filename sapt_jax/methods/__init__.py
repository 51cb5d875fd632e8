"""Continual-learning methods by name. A method is one file of this folder, called as `config.method` calls it."""

import importlib
import inspect

from sapt_jax.methods.base import Method

NAMES = (
    "sapt",
    "sequential",
    "inc_lora",
    "o_lora",
    "n_lora",
    "ella",
    "slao",
    "ewc",
    "single_task",
    "epi",
    "prog_prompt",
    "l2p",
    "any_ssr",
    "inf_lora",
    "gain_lora",
    "replay",
    "lfpt5",
    "joint",
)


def _method_in(name: str) -> type[Method]:
    """The one method that a file of this folder defines."""
    module = importlib.import_module(f"{__name__}.{name}")
    own = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    (method,) = (kind for kind in own if issubclass(kind, Method))
    return method


METHODS: dict[str, type[Method]] = {name: _method_in(name) for name in NAMES}
