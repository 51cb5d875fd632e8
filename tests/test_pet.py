"""The bank and its mixture against a loop over blocks in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from sapt_jax import pet
from sapt_jax.models.layers import lora_delta

SITES = {"decoder": {"self_attention": {"query": (2, 8, 12), "value": (2, 8, 6)}}}


def random_bank(seed, tasks, rank):
    rng = np.random.default_rng(seed)
    bank = pet.init_bank(SITES, rank, tasks)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), bank)


def test_mixture_equals_a_loop_over_blocks():
    rng = np.random.default_rng(0)
    tasks, rank, alpha = 5, 3, 12.0
    bank = random_bank(1, tasks, rank)
    weights = rng.dirichlet(np.ones(tasks), 4)
    x = rng.normal(size=(4, 7, 8))
    mixture = pet.mix(bank, jnp.asarray(weights, jnp.float32), alpha)
    for projection in ("query", "value"):
        for layer in range(2):
            stored = mixture.blocks["decoder"]["self_attention"][projection]
            block = {name: stored[name][layer] for name in ("a", "b")}
            found = lora_delta(jnp.asarray(x, jnp.float32), block, mixture, jnp.float32)
            expected = 0.0
            for t in range(tasks):
                one = pet.read_slot(bank, t)["decoder"]["self_attention"][projection]
                a, b = (np.array(one[name][layer], np.float64) for name in ("a", "b"))
                expected = expected + weights[:, t, None, None] * (alpha / rank) * (x @ a @ b)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_write_changes_one_slot_and_read_returns_it():
    bank = random_bank(2, 4, 2)
    slot = jax.tree.map(lambda x: x + 1.0, pet.init_block(jax.random.key(0), SITES, 2))
    written = pet.write_slot(bank, slot, jnp.asarray(2))
    jax.tree.map(np.testing.assert_array_equal, pet.read_slot(written, 2), slot)
    for t in (0, 1, 3):
        jax.tree.map(np.testing.assert_array_equal, pet.read_slot(written, t), pet.read_slot(bank, t))


def test_gradients_of_a_write_reach_the_slot_alone():
    bank, slot = random_bank(3, 3, 2), pet.init_block(jax.random.key(1), SITES, 2)

    def total(bank, slot):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pet.write_slot(bank, slot, 1)))

    bank_gradient, slot_gradient = jax.grad(total, argnums=(0, 1))(bank, slot)
    assert not any(np.any(x) for x in jax.tree.leaves(bank_gradient))
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, 2 * x, rtol=1e-6), slot_gradient, slot)


def test_a_fresh_block_changes_nothing_and_is_bounded():
    block = pet.init_block(jax.random.key(2), SITES, 4)
    for projection in block["decoder"]["self_attention"].values():
        assert not np.any(projection["b"])
        assert 0 < np.abs(projection["a"]).max() <= 8**-0.5
    first, second = (block["decoder"]["self_attention"][name]["a"] for name in ("query", "value"))
    assert not np.allclose(first, second)
