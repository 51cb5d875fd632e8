"""What a function gives for every input of a split, in the split's order, however the inputs were batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import sharding
from sapt_jax.data.batching import Layout
from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.passes import decode_texts, map_sources
from sapt_jax.pretrained.tokenizer import load_tokenizer

BUCKETS = ((4, 3), (8, 3), (8, 6), (17, 6))


def make_split(seed, rows):
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(1, 18, rows), rng.integers(1, 7, rows)], axis=1)
    sources, targets = ([rng.integers(3, 100, n) for n in column] for column in lengths.T)
    return EncodedSplit(Ragged.from_rows(sources), Ragged.from_rows(targets), 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("rows", "batch_size"), [(23, 4), (23, 1), (5, 8), (16, 8), (1, 1)])
def test_rows_come_back_in_the_order_of_the_split(rows, batch_size, padding_side):
    split = make_split(seed=rows, rows=rows)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    layout = Layout(BUCKETS, batch_size, padding_side, pad_id=0)
    shapes = []

    def digest(source, mask):
        shapes.append(source.shape)
        place = jnp.cumsum(mask, axis=1)
        return jnp.where(mask, source * place**2, 0).sum(axis=1), jnp.stack([mask.sum(axis=1), source.max(axis=1)], 1)

    weighted, summary = map_sources(digest, split, layout, mesh)
    want = [(row * np.arange(1, len(row) + 1) ** 2).sum() for row in (split.sources[i] for i in range(rows))]
    np.testing.assert_array_equal(weighted, want)
    np.testing.assert_array_equal(summary[:, 0], split.sources.lengths)
    np.testing.assert_array_equal(summary[:, 1], [split.sources[i].max() for i in range(rows)])
    # As few batches as there can be, in the buckets' source lengths.
    assert len(shapes) == -(-rows // batch_size)
    assert {size for size, _ in shapes} == {batch_size} and {length for _, length in shapes} <= {4, 8, 17}
    if rows == 23:
        assert len(set(shapes)) == 3


def test_every_batch_is_dispatched_before_the_first_result_is_fetched():
    split = make_split(seed=0, rows=12)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    events = []

    class Result:
        def __init__(self, rows):
            self.rows = rows

        def __array__(self, dtype=None, copy=None):
            events.append("fetched")
            return np.zeros(self.rows)

    def function(source, mask):
        events.append("dispatched")
        return (Result(len(source)),)

    map_sources(function, split, Layout(BUCKETS, 4, "left", 0), mesh)
    assert events == ["dispatched"] * 3 + ["fetched"] * 3


def test_texts_end_at_their_end_token_and_are_stripped():
    tokenizer = load_tokenizer("bytes")
    said = [" a b ", "", "grüß dich\n", "never ends"]
    rows = [tokenizer.encode(text) for text in said]
    ended = [row + [tokenizer.eos_id] + tokenizer.encode("junk") for row in rows[:3]] + rows[3:]
    width = max(map(len, ended))
    tokens = np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in ended])
    assert decode_texts(tokens, tokenizer) == ("a b", "", "grüß dich", "never ends")
