"""Continual learning of language models in JAX. Nothing is imported before its use: the build reads the version."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`sapt_jax.load`, see `sapt_jax.ask.model`."""
    if name == "load":
        from sapt_jax.ask.model import load

        return load
    raise AttributeError(f"module 'sapt_jax' has no attribute {name!r}")
