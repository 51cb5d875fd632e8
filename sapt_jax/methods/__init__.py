"""Continual-learning methods by name."""

from sapt_jax.methods.base import Method
from sapt_jax.methods.sapt import Sapt
from sapt_jax.methods.sequential import SeqLora

METHODS: dict[str, type[Method]] = {"sapt": Sapt, "seq_lora": SeqLora}
