import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax import pet
from sapt_jax.state import active_slots, commit, init_frozen
from tests.helpers.tiny import tiny_method

SITES = {"decoder": {"self_attention": {"query": (2, 8, 8), "value": (2, 8, 4)}}}
METHOD = tiny_method()
TABLE = jnp.zeros((5, 8))


def random_trees(seed):
    rng = np.random.default_rng(seed)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    frozen = init_frozen({"w": jnp.ones((3,))}, METHOD.pet, SITES, 8, 4)
    frozen = frozen.replace(bank=jax.tree.map(noise, frozen.bank), keys=noise(frozen.keys))
    trainable = jax.tree.map(noise, METHOD.open_task(jax.random.key(seed), SITES, TABLE, None))
    return frozen, trainable


def test_commit_changes_one_slot():
    frozen, trainable = random_trees(0)
    target = jnp.asarray([0.1, 0.2, 0.7, 0.0])
    after = commit(frozen, trainable, target, 2)
    jax.tree.map(np.testing.assert_array_equal, pet.read_slot(after.bank, 2), trainable.slot)
    np.testing.assert_array_equal(after.keys[2], trainable.key)
    np.testing.assert_array_equal(after.targets[2], target)
    others = np.array([0, 1, 3])
    for t in others:
        jax.tree.map(np.testing.assert_array_equal, pet.read_slot(after.bank, t), pet.read_slot(frozen.bank, t))
    np.testing.assert_array_equal(after.keys[others], frozen.keys[others])
    np.testing.assert_array_equal(after.targets[others], frozen.targets[others])
    np.testing.assert_array_equal(after.base["w"], frozen.base["w"])


def test_committing_keeps_the_attention_of_training():
    frozen, trainable = random_trees(1)
    pooled = jnp.asarray(np.random.default_rng(2).normal(size=(5, 8)), jnp.float32)
    before = METHOD.log_weights(frozen, trainable, pooled, 2)
    after = METHOD.log_weights(commit(frozen, trainable, frozen.targets[0], 2), trainable, pooled, 2)
    np.testing.assert_array_equal(before, after)


def test_old_answers_do_not_move_where_the_projection_does_not():
    """With the projection unchanged and no weight on the new slot, the mixture over old slots is what it was."""
    frozen, trainable = random_trees(3)
    frozen = frozen.replace(enabled=jnp.asarray([True, True, False, True]))
    pooled = jnp.asarray(np.random.default_rng(4).normal(size=(5, 8)), jnp.float32)
    before = METHOD.log_weights(
        frozen, trainable.replace(key=frozen.keys[1], slot=pet.read_slot(frozen.bank, 1)), pooled, 1
    )
    after = METHOD.log_weights(frozen, trainable, pooled, 2)
    np.testing.assert_array_equal(before, after)


def test_withdrawn_and_later_slots_take_no_part():
    frozen, trainable = random_trees(5)
    frozen = frozen.replace(enabled=jnp.asarray([True, False, True, True]))
    assert active_slots(frozen, 2).tolist() == [True, False, True, False]
    weights = np.exp(METHOD.log_weights(frozen, trainable, jnp.ones((1, 8)), 2))[0]
    assert weights[1] == 0 and weights[3] == 0
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
