"""Continual-learning methods by name, one file each."""

from sapt_jax.methods.base import Method
from sapt_jax.methods.inc_lora import IncLora
from sapt_jax.methods.sapt import Sapt
from sapt_jax.methods.sequential import Sequential

METHODS: dict[str, type[Method]] = {
    "sapt": Sapt,
    "sequential": Sequential,
    "inc_lora": IncLora,
}
