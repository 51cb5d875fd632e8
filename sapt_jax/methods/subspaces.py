"""The directions that inputs of earlier tasks span, at every adapted projection: how they are found and kept out.

Gradient projection memory (Saha et al., arXiv 2103.09762) as InfLoRA's and GainLoRA's released code has it: of second
moments C = sum x x^T instead of the inputs themselves, so that what is added up and cut off are fourth powers of the
inputs' singular values. A span is kept as its projector P = U U^T [D, D]. What is found of moments is found on the host
in float64.
"""

from collections.abc import Callable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax.methods.base import Apply, Batch, Method
from sapt_jax.models.layers import MOMENTS, input_of
from sapt_jax.pet.lora import sites
from sapt_jax.settings import Range
from sapt_jax.state import Frozen, Leaf, Parameters, Task, Trainable, Tree

SHARE = Range(0, 1, above=True)
HIGHEST = jax.lax.Precision.HIGHEST
# The mean norm of a fresh column of LoRA's A: D numbers from U(-1/sqrt(D), 1/sqrt(D)).
COLUMN_NORM = 3**-0.5
# A column of which no more is left off the span has no direction of its own: it is rounding.
NOTHING = 1e-4


def span_leaves(parameters: Parameters, block: Tree) -> Tree:
    """Projectors [layers, D, D] for the inputs of the kernels that a LoRA block adapts."""
    found = {}
    for site in sites(block):
        kernel = parameters["/".join((*site, "kernel"))]
        (layers, width, _), (stacked, axis, _) = kernel.shape, kernel.axes
        found[input_of(site)] = Leaf((layers, width, width), (stacked, axis, axis))
    return flax.traverse_util.unflatten_dict(found)


def input_moments(method: Method, apply: Apply, frozen: Frozen, trainable: Trainable, batch: Batch, task: Task) -> Tree:
    """Of every input of adapted projections the sum of x x^T [layers, D, D] over its tokens, as `span_leaves`."""
    features = method.features(apply, frozen.base, batch["source"], batch["source_mask"])
    mixture = method.mixture(frozen, trainable, method.weights(frozen, trainable, features, task, training=True), task)
    answers = (batch[name] for name in ("source", "source_mask", "target", "target_mask"))
    moments = flax.traverse_util.flatten_dict(apply(frozen.base, *answers, mixture, collect=MOMENTS))
    # Projections that read the same have the same moments.
    return flax.traverse_util.unflatten_dict({input_of(site): moment for (*site, _), moment in moments.items()})


def with_a(block: Tree, factor: Callable[[tuple[str, ...], jax.Array], jax.Array]) -> Tree:
    """A block with factor(name of its site's input, A) in place of every A."""
    moved = {(*site, "a"): factor(input_of(site), own["a"]) for site, own in sites(block).items()}
    return flax.traverse_util.unflatten_dict(flax.traverse_util.flatten_dict(block) | moved)


def with_a_of_inputs(block: Tree, factors: Tree) -> Tree:
    """A block with the factors A [layers, D, R] that are given for its inputs."""
    given = flax.traverse_util.flatten_dict(factors)
    return with_a(block, lambda place, a: given[place])


def with_a_of(one: Tree, other: Tree) -> Tree:
    """A block with the factors A of one block and B of another."""
    return jax.tree_util.tree_map_with_path(lambda path, x, y: x if path[-1].key == "a" else y, one, other)


def with_a_held(trainable: Trainable) -> Trainable:
    """A trainable tree in which no gradient reaches A."""
    return trainable.replace(slot=with_a_of(jax.lax.stop_gradient(trainable.slot), trainable.slot))


def off_span(spans: Tree, block: Tree) -> Tree:
    """A block with (I - P) A, every column scaled to the mean norm of a fresh one; zero where nothing is left."""
    projectors = flax.traverse_util.flatten_dict(spans)

    def rest(place: tuple[str, ...], a: jax.Array) -> jax.Array:
        # Twice: what rounding leaves in the span counts as soon as columns are scaled.
        for _ in range(2):
            a = a - jnp.einsum("KDE,KER->KDR", projectors[place], a, precision=HIGHEST)
        norms = jnp.linalg.norm(a, axis=1, keepdims=True)
        return jnp.where(norms > NOTHING, a * COLUMN_NORM / jnp.maximum(norms, NOTHING), 0.0)

    return with_a(block, rest)


def share_kept(threshold: float, tasks: float, rising_over: int) -> float:
    """The share of squares that spans have to hold once `tasks` have been before: it rises from `threshold` to 1."""
    return min(threshold + (1 - threshold) * tasks / rising_over, 1.0)


def wider_spans(spans: Tree, moments: Tree, share: float, first: bool) -> Tree:
    """The projectors [..., D, D] on the spans with what moments [..., D, D] of one more task add to them.

    Args:
      first: no task was before.
    """

    def wider(span: np.ndarray, moment: np.ndarray) -> np.ndarray:
        layers = zip(
            np.asarray(span, np.float64).reshape(-1, *span.shape[-2:]),
            moment.reshape(-1, *span.shape[-2:]),
            strict=True,
        )
        found = [first_span(own, share) if first else wider_span(before, own, share) for before, own in layers]
        return np.reshape(found, span.shape)

    return jax.tree.map(wider, spans, moments)


def first_span(moment: np.ndarray, share: float) -> np.ndarray:
    """The projector on the largest singular vectors of a moment [D, D], whose squares stay below a share; on one."""
    values, vectors = np.linalg.eigh(moment)
    held = np.cumsum(np.square(values[::-1])) / np.square(values).sum()
    kept = vectors[:, ::-1][:, : max(1, int((held < share).sum()))]
    return kept @ kept.T


def wider_span(span: np.ndarray, moment: np.ndarray, share: float) -> np.ndarray:
    """The projector `span` with as few directions more as it takes to hold a share of a moment's squares, [D, D].

    They are left singular vectors of (I - P) C, largest first.
    """
    rest, total = moment - span @ moment, np.square(moment).sum()
    squares, vectors = np.linalg.eigh(rest @ rest.T)
    held = 1 + (np.concatenate([[0.0], np.cumsum(squares[::-1])]) - np.square(rest).sum()) / total
    missing = held < share
    count = len(span) if missing.all() else int(np.argmin(missing))
    added = vectors[:, ::-1][:, : min(count, len(span) - round(float(np.trace(span))))]
    return span + added @ added.T


def leading(span: np.ndarray, moment: np.ndarray, count: int) -> np.ndarray:
    """The largest `count` left singular vectors [D, count] of (I - P) C, for a projector and a moment [D, D].

    Where fewer lie off the span, the others are zero.
    """
    rest = moment - span @ moment
    vectors = np.linalg.eigh(rest @ rest.T)[1][:, ::-1][:, :count]
    # Of singular value zero, they may lie in the span.
    off = vectors - span @ vectors
    return off * (np.linalg.norm(off, axis=0) > NOTHING)


def leading_of_layers(spans: Tree, moments: Tree, count: int) -> Tree:
    """`leading` of every input and layer, [layers, D, count], divided by sqrt(3)."""

    def stacked(span: np.ndarray, moment: np.ndarray) -> np.ndarray:
        layers = zip(np.asarray(span, np.float64), moment, strict=True)
        return COLUMN_NORM * np.stack([leading(before, own, count) for before, own in layers])

    return jax.tree.map(stacked, spans, moments)
