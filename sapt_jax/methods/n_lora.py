"""N-LoRA: IncLoRA whose blocks are kept sparse, so that they collide less (Yang et al. 2024, arXiv 2410.10179)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax.methods.base import Logs, Samples
from sapt_jax.methods.inc_lora import IncLora
from sapt_jax.pet.lora import sites, sum_over_layers
from sapt_jax.settings import NOT_NEGATIVE, setting
from sapt_jax.state import Frozen, Parameters, Task, Trainable


@dataclasses.dataclass(frozen=True)
class NLora(IncLora):
    """Adds strength * sum |A_t B_t|_1 over sites and layers, of block t alone and without alpha / R."""

    only: ClassVar[tuple[str, str] | None] = ("lora", "keeps LoRA's products sparse")

    strength: float = setting(0.4, "Weight of the sum of absolute entries.", NOT_NEGATIVE)
    product: str = setting(
        "paper",
        "Of which entries: those of A B [D, H]; or those of A^T B^T [R, R], as the released code multiplies its "
        "factors, which needs D = H at every site.",
        choices=("paper", "released"),
    )

    def trainable_leaves(self, parameters: Parameters) -> Trainable:
        leaves = super().trainable_leaves(parameters)
        oblong = ["/".join(at) for at, x in sites(leaves.slot).items() if x["a"].shape[1] != x["b"].shape[2]]
        if self.product == "released" and oblong:
            raise ValueError(
                f"config.n_lora.product='released' needs square kernels, and {', '.join(sorted(oblong))} are not: set "
                "it to 'paper', or let config.pet.targets choose other kernels."
            )
        return leaves

    def penalty(
        self, rng: jax.Array, frozen: Frozen, trainable: Trainable, samples: Samples | None, task: Task
    ) -> tuple[jax.Array, Logs]:
        def entries(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.sum(jnp.abs(a @ b if self.product == "paper" else a.T @ b.T))

        total = sum((sum_over_layers(entries, x["a"], x["b"]) for x in sites(trainable.slot).values()), jnp.zeros(()))
        return self.strength * total, {"entries": total}
