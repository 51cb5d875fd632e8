"""The two trees: what a task's end changes, how they grow, and that no two uses of random numbers share any."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import state
from sapt_jax.models.families import VARIANTS, make_model, parameters
from sapt_jax.state import Leaf, active_slots
from tests.helpers.tiny import tiny_method
from tests.helpers.trees import at, fresh, noise, random_frozen

MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
METHOD, WIDTH = tiny_method(), MODEL.config.d_model
BASE = {"token_embedder": {"embedding": jnp.zeros((5, WIDTH))}}


def random_trees(seed):
    frozen = random_frozen(METHOD, MODEL, BASE, 4, seed, scale=1.0)
    return frozen, noise(seed + 9, fresh(METHOD, MODEL, BASE, seed), 1.0)


def without_slot(tree, slot):
    return [METHOD.pet.read(tree.bank, t) for t in range(4) if t != slot]


@pytest.mark.slow
def test_the_end_of_a_task_changes_one_slot():
    frozen, trainable = random_trees(0)
    target = jnp.asarray([0.1, 0.2, 0.7, 0.0])
    after = METHOD.end_task(frozen, trainable, {"target": target}, at(2))
    jax.tree.map(np.testing.assert_array_equal, METHOD.pet.read(after.bank, 2), trainable.slot)
    np.testing.assert_array_equal(after.memory["keys"][2], trainable.selector["key"])
    np.testing.assert_array_equal(after.memory["reflection_targets"][2], target)
    jax.tree.map(np.testing.assert_array_equal, without_slot(after, 2), without_slot(frozen, 2))
    others = np.array([0, 1, 3])
    for name in ("keys", "reflection_targets"):
        np.testing.assert_array_equal(after.memory[name][others], frozen.memory[name][others])
    jax.tree.map(np.testing.assert_array_equal, after.base, frozen.base)


@pytest.mark.slow
def test_growing_keeps_all_that_was_learned():
    frozen, _ = random_trees(1)
    frozen = frozen.replace(enabled=jnp.asarray([True, False, True, True]))
    declared = METHOD.frozen_leaves(parameters(MODEL), 6)
    grown = state.grow(frozen, declared)
    for t in range(4):
        jax.tree.map(np.testing.assert_array_equal, METHOD.pet.read(grown.bank, t), METHOD.pet.read(frozen.bank, t))
    assert not any(np.any(x) for x in jax.tree.leaves(METHOD.pet.read(grown.bank, 5)))
    assert grown.enabled.tolist() == [True, False, True, True, True, True]
    assert grown.memory["reflection_targets"].shape == (6, 6)
    np.testing.assert_array_equal(grown.memory["reflection_targets"][:4, :4], frozen.memory["reflection_targets"])
    assert not np.any(grown.memory["keys"][4:])
    shapes = jax.tree.map(lambda leaf: leaf.shape, declared, is_leaf=state.is_leaf)
    assert jax.tree.map(lambda x: x.shape, grown.replace(base=None)) == shapes


@pytest.mark.slow
def test_ending_a_task_keeps_the_attention_of_training():
    frozen, trainable = random_trees(1)
    pooled = jnp.asarray(np.random.default_rng(2).normal(size=(5, WIDTH)), jnp.float32)
    before = METHOD.log_weights(frozen, trainable, pooled, at(2))
    ended = METHOD.end_task(frozen, trainable, {"target": frozen.memory["reflection_targets"][0]}, at(2))
    np.testing.assert_array_equal(before, METHOD.log_weights(ended, trainable, pooled, at(2)))


def test_old_answers_do_not_move_where_the_projection_does_not():
    """With the projection unchanged and no weight on the new slot, the mixture over old slots is what it was."""
    frozen, trainable = random_trees(3)
    frozen = frozen.replace(enabled=jnp.asarray([True, True, False, True]))
    pooled = jnp.asarray(np.random.default_rng(4).normal(size=(5, WIDTH)), jnp.float32)
    selector = {**trainable.selector, "key": frozen.memory["keys"][1]}
    earlier = trainable.replace(selector=selector, slot=METHOD.pet.read(frozen.bank, 1))
    before = METHOD.log_weights(frozen, earlier, pooled, at(1))
    np.testing.assert_array_equal(before, METHOD.log_weights(frozen, trainable, pooled, at(2)))


def test_withdrawn_and_later_slots_take_no_part():
    frozen, trainable = random_trees(5)
    frozen = frozen.replace(enabled=jnp.asarray([True, False, True, True]))
    assert active_slots(frozen, at(2)).tolist() == [True, False, True, False]
    assert state.earlier_slots(frozen, at(3)).tolist() == [True, False, True, False]
    weights = np.exp(METHOD.log_weights(frozen, trainable, jnp.ones((1, WIDTH)), at(2)))[0]
    assert weights[1] == 0 and weights[3] == 0
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def test_a_leaf_says_where_the_bank_has_its_task_axis():
    leaf = Leaf((2, 3, 4), ("layers", "embed", "rank"), task_axis=2).in_bank(5)
    assert leaf.shape == (2, 3, 5, 4) and leaf.axes == ("layers", "embed", "tasks", "rank")
    with pytest.raises(ValueError, match="does not say where the bank has its task axis"):
        Leaf((2,), ("query",)).in_bank(5)
    with pytest.raises(ValueError, match=r"shape \(2,\) cannot have the logical axes"):
        Leaf((2,), ("query", "tasks"))


def test_a_module_declares_what_it_would_make():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("query", "query_hidden"))
            return x @ self.param("matrix", init, (x.shape[-1], 3), jnp.float32)

    leaves = state.declare(Pair(), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    assert leaves["matrix"].shape == (4, 3) and leaves["matrix"].axes == ("query", "query_hidden")
    made = state.start(jax.random.key(0), leaves, None)
    assert jax.tree.map(jnp.shape, made) == {"matrix": (4, 3)} and np.std(made["matrix"]) > 0.3


STREAMS = ("begin", "step", "written samples", "weights of the base")


def test_no_two_uses_share_random_numbers():
    """Keys of all streams, tasks and steps, and what each is split into: JAX's split is a fold that others may do."""
    keys = [
        key
        for name, task, step in itertools.product(STREAMS, range(4), range(4))
        for own in [state.rng(7, name, task, step)]
        for key in (own, *jax.random.split(own, 4))
    ]
    numbers = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(numbers) == len(keys)
    uniform = np.array([jax.random.uniform(key) for key in keys])
    assert len(np.unique(uniform)) > 0.99 * len(keys)


def test_streams_of_the_host_and_of_seeds_differ_too():
    first = {state.host_rng(seed, name, task).integers(2**62) for seed in (1, 2) for name in STREAMS for task in (0, 1)}
    assert len(first) == 2 * len(STREAMS) * 2
    assert not np.array_equal(*(jax.random.key_data(state.rng(seed, "step")) for seed in (1, 2)))
