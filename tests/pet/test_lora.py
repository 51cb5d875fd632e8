"""The bank and its mixture, LoRA and prompts, against a loop over blocks in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import pet
from sapt_jax.models.layers import lora_delta

SITES = {"decoder": {"self_attention": {"query": (2, 8, 12), "value": (2, 8, 6)}}}
TABLE = np.random.default_rng(9).normal(size=(11, 8)).astype(np.float32)
LORA = pet.Lora(rank=2, alpha=12.0, stop_gradient_through_bank=False)
PROMPT = pet.Prompt(prompt_length=3)
KINDS = pytest.mark.parametrize("kind", [LORA, PROMPT], ids=["lora", "prompt"])


def random_bank(kind, seed, tasks):
    rng = np.random.default_rng(seed)
    bank = kind.init_bank(SITES, 8, tasks)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), bank)


def test_lora_mixture_equals_a_loop_over_blocks():
    rng = np.random.default_rng(0)
    tasks, kind = 5, pet.Lora(rank=3, alpha=12.0, stop_gradient_through_bank=False)
    bank = random_bank(kind, 1, tasks)
    weights = rng.dirichlet(np.ones(tasks), 4)
    x = rng.normal(size=(4, 7, 8))
    mixture = kind.mix(bank, jnp.asarray(weights, jnp.float32), 0)
    for projection in ("query", "value"):
        for layer in range(2):
            stored = mixture.blocks["decoder"]["self_attention"][projection]
            block = {name: stored[name][layer] for name in ("a", "b")}
            found = lora_delta(jnp.asarray(x, jnp.float32), block, mixture, jnp.float32)
            expected = 0.0
            for t in range(tasks):
                one = pet.read_slot(bank, t)["decoder"]["self_attention"][projection]
                a, b = (np.array(one[name][layer], np.float64) for name in ("a", "b"))
                expected = expected + weights[:, t, None, None] * (12.0 / 3) * (x @ a @ b)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_prompt_mixture_equals_a_loop_over_prompts():
    bank = random_bank(PROMPT, 4, 5)
    weights = np.random.default_rng(5).dirichlet(np.ones(5), 4)
    found = PROMPT.mix(bank, jnp.asarray(weights, jnp.float32), 0).prompt
    expected = sum(
        weights[:, t, None, None] * np.array(pet.read_slot(bank, t)["prompt"], np.float64)[None] for t in range(5)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@KINDS
def test_write_changes_one_slot_and_read_returns_it(kind):
    bank = random_bank(kind, 2, 4)
    slot = jax.tree.map(lambda x: x + 1.0, kind.init_block(jax.random.key(0), SITES, TABLE))
    written = pet.write_slot(bank, slot, jnp.asarray(2))
    jax.tree.map(np.testing.assert_array_equal, pet.read_slot(written, 2), slot)
    for t in (0, 1, 3):
        jax.tree.map(np.testing.assert_array_equal, pet.read_slot(written, t), pet.read_slot(bank, t))


@KINDS
def test_growing_keeps_every_block(kind):
    bank = random_bank(kind, 6, 2)
    grown = pet.grow(bank, 5)
    for t in range(2):
        jax.tree.map(np.testing.assert_array_equal, pet.read_slot(grown, t), pet.read_slot(bank, t))
    assert not any(np.any(x) for x in jax.tree.leaves(pet.read_slot(grown, 4)))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), grown, kind.init_bank(SITES, 8, 5))


@KINDS
def test_gradients_of_a_write_reach_the_slot_alone(kind):
    bank, slot = random_bank(kind, 3, 3), kind.init_block(jax.random.key(1), SITES, TABLE)

    def total(bank, slot):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pet.write_slot(bank, slot, 1)))

    bank_gradient, slot_gradient = jax.grad(total, argnums=(0, 1))(bank, slot)
    assert not any(np.any(x) for x in jax.tree.leaves(bank_gradient))
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, 2 * x, rtol=1e-6), slot_gradient, slot)


def test_a_fresh_lora_block_changes_nothing_and_is_bounded():
    block = pet.Lora(4, 8.0, False).init_block(jax.random.key(2), SITES, TABLE)
    for projection in block["decoder"]["self_attention"].values():
        assert not np.any(projection["b"])
        assert 0 < np.abs(projection["a"]).max() <= 8**-0.5
    first, second = (block["decoder"]["self_attention"][name]["a"] for name in ("query", "value"))
    assert not np.allclose(first, second)


def test_a_fresh_prompt_is_drawn_from_the_vocabulary():
    prompts = [np.array(PROMPT.init_block(jax.random.key(seed), SITES, TABLE)["prompt"]) for seed in range(8)]
    rows = {tuple(row) for prompt in prompts for row in prompt}
    assert rows <= {tuple(row) for row in TABLE}
    assert len(rows) > 6


def test_the_prompt_goes_before_the_input_and_is_seen():
    rng = np.random.default_rng(7)
    embeddings, mask = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.bfloat16), jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 1]])
    mixture = PROMPT.mix(random_bank(PROMPT, 8, 2), jnp.full((2, 2), 0.5), 0)
    x, seen = pet.put_prompt_before(mixture, embeddings, mask.astype(bool))
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x[:, 3:], embeddings)
    np.testing.assert_array_equal(x[:, :3], mixture.prompt.astype(jnp.bfloat16))
    assert seen.astype(int).tolist() == [[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1]]
    assert mixture.for_answers(3).prompt is None
