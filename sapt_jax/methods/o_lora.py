"""O-LoRA: IncLoRA whose blocks are pulled into orthogonal subspaces (Wang et al. 2023, arXiv 2310.14152)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from sapt_jax import state
from sapt_jax.methods.base import Logs, Samples
from sapt_jax.methods.inc_lora import IncLora
from sapt_jax.pet.lora import sites
from sapt_jax.settings import NOT_NEGATIVE, setting
from sapt_jax.state import Frozen, Task, Trainable


@dataclasses.dataclass(frozen=True)
class OLora(IncLora):
    """Adds lambda1 sum_sites sum_i |A_i^T A_t|_1 over earlier blocks i, and lambda2 times the norms of block t.

    Both are sums over layers and sites, as in the release, so lambda1 scales with depth and rank. Only A is held
    orthogonal. The norms are those of the block's matrices, layer by layer, not squared.
    """

    only: ClassVar[tuple[str, str] | None] = ("lora", "keeps LoRA's factors orthogonal")

    lambda1: float = setting(0.5, "Weight of the overlap with all earlier blocks.", NOT_NEGATIVE)
    lambda2: float = setting(0.0, "Weight of the norms of the block's matrices.", NOT_NEGATIVE)

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        earlier = state.earlier_slots(frozen, task)[:, None, None]
        bank, overlap, norms = sites(jax.lax.stop_gradient(frozen.bank)), jnp.zeros(()), jnp.zeros(())
        for site, block in sites(trainable.slot).items():
            products = jnp.einsum("KDTR,KDS->KTRS", bank[site]["a"], block["a"])
            overlap += jnp.sum(jnp.abs(products) * earlier)
            # The gradient of a plain norm is NaN where a fresh B is zero.
            norms += sum(jnp.sum(optax.safe_norm(factor, 0.0, axis=(1, 2))) for factor in block.values())
        return self.lambda1 * overlap + self.lambda2 * norms, {"overlap": overlap, "norms": norms}
