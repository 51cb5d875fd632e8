"""SLAO's two blocks against NumPy in float64: where a task starts, what is merged, and which block answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.slao import Slao
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pet.lora import sites
from tests.helpers.trees import at, empty_frozen, fresh, init_base, noise

RANK = 3
MODELS = {name: make_model(VARIANTS[name], "float32", "none") for name in ("llama-tiny", "t5-tiny")}
METHOD = Slao(Lora(RANK, 6.0))


def trained(seed, trainable):
    return trainable.replace(slot=noise(seed, trainable.slot))


def factors(tree):
    """{site: (a, b)} of a block in float64."""
    return {site: tuple(np.array(x[name], np.float64) for name in "ab") for site, x in sites(tree).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_task_starts_from_an_orthonormal_a_and_the_b_before(name):
    base = init_base(MODELS[name])
    before = trained(1, fresh(METHOD, MODELS[name], base, 0))
    after = fresh(METHOD, MODELS[name], base, 2, previous=before, task=at(1, slot=0))
    for site, (q, b) in factors(after.slot).items():
        a, old_b = factors(before.slot)[site]
        np.testing.assert_array_equal(b, old_b)
        for layer in range(len(a)):
            np.testing.assert_allclose(q[layer].T @ q[layer], np.eye(RANK), atol=1e-5)
            # A = Q R with R upper triangular and its diagonal positive: there is one such Q.
            r = q[layer].T @ a[layer]
            np.testing.assert_allclose(q[layer] @ r, a[layer], atol=1e-5)
            np.testing.assert_allclose(np.tril(r, -1), 0.0, atol=1e-5)
            assert (np.diag(r) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_block_follows_the_formula_over_three_tasks(name):
    base = init_base(MODELS[name])
    frozen, trainable, merged_b = empty_frozen(METHOD, MODELS[name], base, 1), None, {}
    for task in range(3):
        place = at(task, slot=0, steps=0)
        start = fresh(METHOD, MODELS[name], base, task, previous=trainable, frozen=frozen, task=place)
        trainable = trained(10 + task, start)
        frozen = METHOD.end_task(frozen, trainable, None, place)
        for site, (a, b) in factors(METHOD.pet.read(frozen.bank, 0)).items():
            own_a, own_b = factors(trainable.slot)[site]
            old = merged_b.get(site, np.zeros_like(own_b))
            merged_b[site] = old + (own_b - old) / np.sqrt(task + 1)
            np.testing.assert_array_equal(a, own_a)
            np.testing.assert_allclose(b, merged_b[site], rtol=1e-5, atol=1e-6)
            if task == 0:
                np.testing.assert_array_equal(b, own_b)


@pytest.mark.slow
def test_training_mixes_the_working_block_and_tests_the_merged_one():
    model = MODELS["llama-tiny"]
    base = init_base(model)
    frozen = empty_frozen(METHOD, model, base, 1)
    frozen = frozen.replace(bank=noise(3, frozen.bank))
    trainable = trained(4, fresh(METHOD, model, base, 0))

    def mixed(slot, steps):
        task = at(1, slot=0, steps=steps)
        weights = METHOD.weights(frozen, trainable, jnp.zeros((2, 1)), task, training=steps > 0)
        return METHOD.mixture(frozen, trainable.replace(slot=slot), weights, task).blocks

    # The task axis of one is gone by then.
    merged = METHOD.pet.read(frozen.bank, 0)
    jax.tree.map(np.testing.assert_array_equal, mixed(trainable.slot, 10), trainable.slot)
    jax.tree.map(np.testing.assert_array_equal, mixed(trainable.slot, 0), merged)
    for steps, reaches in ((10, True), (0, False)):
        gradient = jax.grad(lambda slot, s=steps: sum(jnp.sum(x**2) for x in jax.tree.leaves(mixed(slot, s))))
        assert all(np.any(x) == reaches for x in jax.tree.leaves(gradient(trainable.slot)))


def test_blocks_other_than_lora_are_refused():
    with pytest.raises(ValueError, match="config.method='slao' .* set config.pet.kind='lora'"):
        Slao(Prompt(3))
