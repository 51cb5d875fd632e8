"""Tasks' inputs as Gaussians of their features: a few kilobytes a task, and no text, in place of pseudo-samples.

The reflection loss sees an input through its pooled embedding alone, so that drawn embeddings serve it as well as drawn
texts would, and cost no forward pass. Not in the paper.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax import state
from sapt_jax.state import Leaf, Tree


def leaves(capacity: int, width: int, rank: int) -> Tree:
    """Declares mean [T, F], factor [T, F, R] and diagonal [T, F] of a Gaussian for each of T slots.

    Its covariance is factor factor^T + diag(diagonal).
    """
    row = (state.TASKS, "query")
    return {
        "mean": Leaf((capacity, width), row),
        "factor": Leaf((capacity, width, rank), (*row, "rank")),
        "diagonal": Leaf((capacity, width), row),
    }


def fit(features: np.ndarray, rank: int) -> Tree:
    """The Gaussian of features [N, F], in float64.

    The factor holds the leading eigenvectors of the covariance (which divides by N), the diagonal what they leave of
    each variance: variances are exact, and of the correlations the strongest `rank` directions are kept.

    Returns:
      mean [F], factor [F, rank], zero in the columns past the covariance's own rank, and diagonal [F].
    """
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    apart = (features - mean) / np.sqrt(len(features))
    # The covariance's eigenvectors, found on the smaller side.
    across = len(features) < features.shape[1]
    values, vectors = np.linalg.eigh(apart @ apart.T if across else apart.T @ apart)
    leading = np.argsort(values)[::-1][:rank]
    found = apart.T @ vectors[:, leading] if across else vectors[:, leading] * np.sqrt(np.maximum(values[leading], 0.0))
    factor = np.pad(found, ((0, 0), (0, rank - found.shape[1])))
    left = features.var(axis=0) - np.sum(factor**2, axis=1)
    return {"mean": mean, "factor": factor, "diagonal": np.maximum(left, 0.0)}


def draw(rng: jax.Array, gaussians: Tree, number: int) -> jax.Array:
    """`number` features of every slot's Gaussian, [T, number, F] float32."""
    of_factor, of_diagonal = jax.random.split(rng)
    mean, factor, diagonal = (gaussians[name] for name in ("mean", "factor", "diagonal"))
    capacity, width, rank = factor.shape
    along = jax.random.normal(of_factor, (capacity, number, rank))
    apart = jax.random.normal(of_diagonal, (capacity, number, width))
    shared = jnp.einsum("TNR,TFR->TNF", along, factor)
    return mean[:, None] + shared + apart * jnp.sqrt(diagonal)[:, None]
