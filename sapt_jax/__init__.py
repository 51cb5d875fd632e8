"""Continual learning of language models in JAX. This file imports nothing: the build reads the version from it."""

__version__ = "0.1.0"
