"""ELLA: IncLoRA whose blocks stay out of the entries that earlier ones use (arXiv 2601.02232)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax import state
from sapt_jax.methods.base import Logs, Samples
from sapt_jax.methods.inc_lora import IncLora
from sapt_jax.pet.lora import sites, sum_over_layers
from sapt_jax.settings import NOT_NEGATIVE, setting
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class Ella(IncLora):
    """Adds strength * sum |dW_t * sum_{i<t} dW_i|_F^2 over sites and layers, entry by entry, with dW = A B.

    Without alpha / R, whose fourth power is then a part of `strength`.
    """

    only: ClassVar[tuple[str, str] | None] = ("lora", "compares LoRA's products")

    # No published value is known. Entries of a product are about 1e-3, so that their fourth powers need a large weight.
    strength: float = setting(1e4, "Weight of the overlap with all earlier blocks; sweep it.", NOT_NEGATIVE)

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        earlier = state.earlier_slots(frozen, task)[:, None]

        def overlap(a: jax.Array, b: jax.Array, stored_a: jax.Array, stored_b: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(a @ b * jnp.einsum("DTR,TRH->DH", stored_a * earlier, stored_b)))

        bank, total = sites(jax.lax.stop_gradient(frozen.bank)), jnp.zeros(())
        for site, block in sites(trainable.slot).items():
            total += sum_over_layers(overlap, block["a"], block["b"], bank[site]["a"], bank[site]["b"])
        return self.strength * total, {"overlap": total}
