"""Continual-learning methods by name."""

from sapt_jax.methods.protocol import Method
from sapt_jax.methods.sapt import Sapt
from sapt_jax.methods.seq_lora import SeqLora

METHODS: dict[str, type[Method]] = {"sapt": Sapt, "seq_lora": SeqLora}
