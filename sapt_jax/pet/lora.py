"""LoRA blocks (arXiv 2106.09685) on any kernels of the layers.

In the bank a factor is `a` [layers, D, T, R] or `b` [layers, T, R, H]. The mixture of all blocks is then one LoRA of
rank T*R, and reaching that form is a reshape that moves no data (SAPT, section 3.2: the weighted sum of the blocks'
outputs).
"""

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar

import flax.traverse_util
import jax
import jax.numpy as jnp

from sapt_jax.pet.base import Mixture, Pet
from sapt_jax.state import Leaf, Parameters, Tree

LAYERS = "layers"
# Query and value of every attention, as the paper.
QUERY_AND_VALUE = r".*/(query|value)/kernel"


@dataclasses.dataclass(frozen=True)
class Lora(Pet):
    """Two factors beside every kernel whose path in the base tree `targets` matches.

    Attributes:
      rank, alpha: every block is scaled by alpha / rank.
      stop_gradient_through_bank: gradients reach the layers below through the current block alone.
      targets: a regular expression that has to match the whole path, such as decoder/layers/mlp/wo/kernel.
    """

    rank: int
    alpha: float
    stop_gradient_through_bank: bool = False
    targets: str = QUERY_AND_VALUE

    kind: ClassVar[str] = "lora"
    task_axes: ClassVar[dict[str, int]] = {"a": 2, "b": 1}

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def block(self, parameters: Parameters) -> Tree:
        """`a` [layers, D, R] ~ U(-1/sqrt(D), 1/sqrt(D)), `b` [layers, R, H] = 0 (Kaiming-uniform, LoRA's release).

        Raises:
          ValueError: `targets` is no regular expression, or matches no kernel of a stack of layers.
        """
        try:
            matched = [path for path in parameters if re.fullmatch(self.targets, path)]
        except re.error as error:
            raise ValueError(f"config.pet.targets={self.targets!r} is no regular expression: {error}") from None
        kernels = {path for path, x in parameters.items() if x.axes[:1] == (LAYERS,) and path.endswith("/kernel")}
        if not matched or (wrong := sorted(set(matched) - kernels)):
            what = f"matches {', '.join(wrong)}, which LoRA cannot adapt" if matched else "matches no parameter"
            raise ValueError(f"config.pet.targets={self.targets!r} {what}: choose among {', '.join(sorted(kernels))}.")
        flat = {}
        for path in matched:
            (layers, fan_in, fan_out), (_, axis_in, axis_out) = parameters[path].shape, parameters[path].axes
            shape = (layers, fan_in, self.rank)

            def uniform(rng, base, shape=shape):
                del base
                bound = shape[1] ** -0.5
                return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)

            module = tuple(path.split("/")[:-1])
            flat[*module, "a"] = Leaf(shape, (LAYERS, axis_in, "rank"), uniform, self.task_axes["a"])
            shape = (layers, self.rank, fan_out)
            flat[*module, "b"] = Leaf(shape, (LAYERS, "rank", axis_out), None, self.task_axes["b"])
        return flax.traverse_util.unflatten_dict(flat)

    def mix(self, bank: Tree, weights: jax.Array, slot: jax.Array) -> Mixture:
        """A mixture whose output, added to W x, is sum_t weights[:, t] * (alpha / R) * (x A_t) B_t."""

        def flatten(path, leaf):
            axis = self._task_axis(path)
            return leaf.reshape(leaf.shape[:axis] + (-1,) + leaf.shape[axis + 2 :])

        columns = jnp.repeat(weights, self.rank, axis=1) * self.scale
        slot_columns = None
        if self.stop_gradient_through_bank:
            slot_columns = jnp.repeat(jnp.arange(weights.shape[1]) == slot, self.rank)
        return Mixture(jax.tree_util.tree_map_with_path(flatten, bank), columns, slot_columns)


def sites(tree: Tree) -> dict[tuple[str, ...], Tree]:
    """The adapted modules of a tree of LoRA blocks: {path of the module: {"a": ..., "b": ...}}."""
    found: dict[tuple[str, ...], Tree] = {}
    for path, leaf in flax.traverse_util.flatten_dict(tree).items():
        found.setdefault(path[:-1], {})[path[-1]] = leaf
    return found


def sum_over_layers(term: Callable[..., jax.Array], *factors: jax.Array) -> jax.Array:
    """The sum over layers of term(*factors of the layer), one layer at a time.

    What `term` makes of a layer is made again in the backward pass, so that of products as large as a kernel a single
    one lies in memory.

    Args:
      factors: [layers, ...] each.
    """

    def add(total: jax.Array, layer: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + term(*layer), None

    return jax.lax.scan(jax.checkpoint(add), jnp.zeros(()), factors)[0]
