"""ELLA's penalty against a loop in float64, and where it is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.ella import Ella
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pet.lora import sites
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

RANK, TASKS = 3, 4
MODELS = {name: make_model(VARIANTS[name], "float32", "none") for name in ("llama-tiny", "t5-tiny")}
METHOD = Ella(Lora(RANK, 6.0), strength=0.7)


def trees(name, seed):
    model = MODELS[name]
    base = init_base(model)
    trainable = fresh(METHOD, model, base, seed)
    return random_frozen(METHOD, model, base, TASKS, seed), trainable.replace(slot=noise(seed + 5, trainable.slot))


def penalty(frozen, trainable, task):
    return METHOD.penalty(jax.random.key(0), frozen, trainable, None, at(task))


def overlap_of(frozen, trainable, earlier):
    """Sum over sites and layers of the squared entries of A_t B_t times those of the sum of A_i B_i."""
    total = 0.0
    for site, block in sites(trainable.slot).items():
        stored = {name: np.array(x, np.float64) for name, x in sites(frozen.bank)[site].items()}
        for layer, (a, b) in enumerate(zip(*(np.array(block[name], np.float64) for name in "ab"), strict=True)):
            before = np.zeros((a.shape[0], b.shape[1]))
            for i in earlier:
                before += stored["a"][layer, :, i] @ stored["b"][layer, i]
            total += np.sum((a @ b * before) ** 2)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", [0, 1, 3])
def test_the_penalty_equals_a_loop(name, task):
    frozen, trainable = trees(name, task)
    loss, logs = penalty(frozen, trainable, task)
    overlap = overlap_of(frozen, trainable, range(task))
    np.testing.assert_allclose(logs["overlap"], overlap, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.7 * overlap, rtol=1e-5)


@pytest.mark.slow
def test_withdrawn_and_later_slots_add_nothing():
    frozen, trainable = trees("llama-tiny", 1)
    frozen = frozen.replace(enabled=jnp.asarray([True, False, True, True]))
    _, logs = penalty(frozen, trainable, 3)
    np.testing.assert_allclose(logs["overlap"], overlap_of(frozen, trainable, (0, 2)), rtol=1e-5)


@pytest.mark.slow
def test_blocks_that_touch_other_entries_cost_nothing():
    """Earlier blocks write to the first half of the outputs, the own one to the second."""
    frozen, trainable = trees("t5-tiny", 2)

    def without(tree, outputs):
        def cleared(path, x):
            return x.at[..., outputs].set(0.0) if path[-1].key == "b" else x

        return jax.tree_util.tree_map_with_path(cleared, tree)

    apart = frozen.replace(bank=without(frozen.bank, slice(32, None)))
    assert penalty(apart, trainable.replace(slot=without(trainable.slot, slice(32))), 3)[0] == 0
    assert penalty(apart, trainable.replace(slot=without(trainable.slot, slice(31))), 3)[0] > 0


@pytest.mark.slow
def test_the_gradient_is_the_formula_s_and_reaches_the_slot_alone():
    frozen, trainable = trees("llama-tiny", 3)

    def loss(bank, slot):
        return penalty(frozen.replace(bank=bank), trainable.replace(slot=slot), 2)[0]

    of_bank, of_slot = jax.grad(loss, argnums=(0, 1))(frozen.bank, trainable.slot)
    assert not any(np.any(x) for x in jax.tree.leaves(of_bank))
    for site, block in sites(trainable.slot).items():
        stored = {name: np.array(x, np.float64) for name, x in sites(frozen.bank)[site].items()}
        for layer, (a, b) in enumerate(zip(*(np.array(block[name], np.float64) for name in "ab"), strict=True)):
            before = sum(stored["a"][layer, :, i] @ stored["b"][layer, i] for i in range(2))
            of_product = 2 * 0.7 * (a @ b) * before**2
            found = sites(of_slot)[site]
            np.testing.assert_allclose(found["a"][layer], of_product @ b.T, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found["b"][layer], a.T @ of_product, rtol=1e-4, atol=1e-5)
    start = fresh(METHOD, MODELS["llama-tiny"], frozen.base, 4).slot
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(loss, argnums=1)(frozen.bank, start)))


def test_blocks_other_than_lora_are_refused():
    with pytest.raises(ValueError, match="config.method='ella' .* set config.pet.kind='lora'"):
        Ella(Prompt(3))
