"""N-LoRA's penalty against a loop in float64, in both readings."""

import jax
import numpy as np
import pytest

from sapt_jax.methods.n_lora import NLora
from sapt_jax.models.families import VARIANTS, make_model, parameters
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pet.lora import sites
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

RANK, TASKS = 3, 4
MODELS = {name: make_model(VARIANTS[name], "float32", "none") for name in ("llama-tiny", "t5-tiny")}
METHOD = NLora(Lora(RANK, 6.0), strength=0.7)
SQUARE = NLora(Lora(RANK, 6.0, targets=".*/self_attention/query/kernel"), strength=0.7, product="released")


def trees(method, name, seed):
    model = MODELS[name]
    base = init_base(model)
    trainable = fresh(method, model, base, seed)
    return random_frozen(method, model, base, TASKS, seed), trainable.replace(slot=noise(seed + 5, trainable.slot))


def penalty(method, frozen, trainable, task):
    return method.penalty(jax.random.key(0), frozen, trainable, None, at(task))


def entries_of(trainable, product):
    """Sum over sites and layers of the absolute entries of a product of the two factors [D, R] and [R, H]."""
    blocks = [[np.array(block[name], np.float64) for name in "ab"] for block in sites(trainable.slot).values()]
    return sum(np.abs(product(*factors)).sum() for block in blocks for factors in zip(*block, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_is_the_sum_of_the_product_s_entries_whatever_the_bank_holds(name):
    frozen, trainable = trees(METHOD, name, 1)
    loss, logs = penalty(METHOD, frozen, trainable, 2)
    entries = entries_of(trainable, lambda a, b: a @ b)
    np.testing.assert_allclose(logs["entries"], entries, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.7 * entries, rtol=1e-5)
    assert loss == penalty(METHOD, trees(METHOD, name, 9)[0], trainable, 0)[0]


def test_the_released_reading_sums_a_product_of_rank_by_rank():
    frozen, trainable = trees(SQUARE, "llama-tiny", 2)
    expected = 0.7 * entries_of(trainable, lambda a, b: a.T @ b.T)
    np.testing.assert_allclose(penalty(SQUARE, frozen, trainable, 2)[0], expected, rtol=1e-5)
    assert abs(expected - 0.7 * entries_of(trainable, lambda a, b: a @ b)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_the_released_reading_refuses_oblong_kernels(name):
    method = NLora(Lora(RANK, 6.0), product="released")
    with pytest.raises(ValueError, match="product='released' needs square kernels, and .*/value are not: set it"):
        method.trainable_leaves(parameters(MODELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHOD, SQUARE], ids=["paper", "released"])
def test_gradients_are_those_of_the_signs_and_finite_where_b_is_zero(method):
    frozen, trainable = trees(method, "llama-tiny", 3)
    gradient = jax.grad(lambda slot: penalty(method, frozen, trainable.replace(slot=slot), 1)[0])
    found, blocks = sites(gradient(trainable.slot)), sites(trainable.slot)
    for site, block in blocks.items():
        for layer, (a, b) in enumerate(zip(*(np.array(block[name], np.float64) for name in "ab"), strict=True)):
            if method.product == "paper":
                signs = np.sign(a @ b)
                expected = signs @ b.T, a.T @ signs
            else:
                signs = np.sign(a.T @ b.T)
                expected = (signs @ b).T, (a @ signs).T
            for name, want in zip("ab", expected, strict=True):
                np.testing.assert_allclose(found[site][name][layer], 0.7 * want, rtol=1e-5, atol=1e-5)
    start = fresh(method, MODELS["llama-tiny"], frozen.base, 4).slot
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(start)))


def test_blocks_other_than_lora_are_refused():
    with pytest.raises(ValueError, match="config.method='n_lora' .* set config.pet.kind='lora'"):
        NLora(Prompt(3))
