"""Fingerprints of what a run reads from elsewhere: the same bytes have the same one, wherever they lie."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sapt_jax.optimization import leaf_path
from sapt_jax.pretrained.tokenizer import Tokenizer
from sapt_jax.run import Run
from sapt_jax.state import Tree

_PROBE = "Output: naïve 中文 1234567\n\tdef f(x): return x  # it's 3.5%"
# Decoding all ids of a large vocabulary takes seconds.
_MOST_IDS = 4096


def contents_of(run: Run, base: Tree) -> dict[str, Any]:
    """Fingerprints by the setting that names the place: of weights that were read, of the tokenizer, of each pool."""
    contents: dict[str, Any] = {"model.tokenizer": tokenizer_fingerprint(run.tokenizer)}
    if run.config.model.path:
        contents["model.path"] = weights_fingerprint(base, run.mesh)
    if run.config.pseudo_samples.source == "files":
        pools = {task.name: task.pseudo.sources for task in run.stream.tasks if task.pseudo}
        contents["pseudo_samples.dir"] = {
            name: _digest(sources.ids.tobytes(), sources.offsets.tobytes()) for name, sources in pools.items()
        }
    return contents


def weights_fingerprint(params: Tree, mesh: Mesh) -> str:
    """Of every bit of every array, its path, shape and dtype: exact, and the same however the arrays are split."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    sums = jax.jit(lambda arrays: [_checksum(x) for x in arrays], out_shardings=everywhere)([x for _, x in leaves])
    return _digest(
        *(f"{leaf_path(path)} {x.shape} {x.dtype} {int(total)}" for (path, x), total in zip(leaves, sums, strict=True))
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Of its size and special ids, of the text of its ids, and of how it splits a text."""
    sampled = np.unique(np.linspace(0, tokenizer.vocab_size - 1, _MOST_IDS, dtype=int)).tolist()
    special = (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos)
    return _digest(repr(special), *(tokenizer.decode([token]) for token in sampled), repr(tokenizer.encode(_PROBE)))


def _checksum(x: jax.Array) -> jax.Array:
    """The sum of an array's bits, each entry's times an odd number that its place gives, modulo 2^32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (place * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
