"""SAPT's selector under the names that files for PyTorch have: a key, and four arrays of the query projection."""

from collections.abc import Mapping
from typing import Any

from sapt_jax.state import Tree


def query_projection(selector: Tree) -> dict[str, Any]:
    """{"down": [D, hidden], "up": [hidden, D], "scale": [D], "bias": [D]} of a selector."""
    projection = selector["query_projection"]
    return {name: projection[name]["kernel"] for name in ("down", "up")} | dict(projection["norm"])


def make_selector(key: Any, projection: Mapping[str, Any]) -> Tree:
    """The selector of a key [D] and the arrays of its query projection."""
    kernels = {name: {"kernel": projection[name]} for name in ("down", "up")}
    norm = {name: projection[name] for name in ("scale", "bias")}
    return {"key": key, "query_projection": {**kernels, "norm": norm}}
