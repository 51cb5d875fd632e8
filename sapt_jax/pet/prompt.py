"""Soft prompts (prompt tuning, arXiv 2104.08691). In the bank they are `prompt` [T, P, D]."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapt_jax.pet.base import Mixture, Pet
from sapt_jax.state import Leaf, Parameters, Tree, width_of


@dataclasses.dataclass(frozen=True)
class Prompt(Pet):
    """`length` vectors before the input's embeddings.

    They go before the encoder's input in T5, before the whole sequence in LLaMA. What mixes them never sees them.
    """

    length: int

    kind: ClassVar[str] = "prompt"
    task_axes: ClassVar[dict[str, int]] = {"prompt": 0}

    @property
    def prompt_length(self) -> int:
        return self.length

    def block(self, parameters: Parameters) -> Tree:
        """{"prompt": [P, D]}, at first the embeddings of tokens drawn uniformly from the vocabulary."""
        d_model = width_of(parameters)

        def drawn(rng, base):
            table = base["token_embedder"]["embedding"]
            ids = jax.random.randint(rng, (self.length,), 0, table.shape[0])
            return jnp.take(table, ids, axis=0).astype(jnp.float32)

        leaf = Leaf((self.length, d_model), ("prompt", "act_embed"), drawn, self.task_axes["prompt"])
        return {"prompt": leaf}

    def mix(self, bank: Tree, weights: jax.Array, slot: jax.Array) -> Mixture:
        """A mixture with the prompt sum_t weights[:, t] P_t."""
        del slot
        return Mixture(prompt=jnp.einsum("BT,TPD->BPD", weights, bank["prompt"]))
