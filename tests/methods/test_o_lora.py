"""O-LoRA's penalty against a loop in float64, and where it is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.o_lora import OLora
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pet.lora import sites
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

RANK, TASKS = 3, 4
MODELS = {name: make_model(VARIANTS[name], "float32", "none") for name in ("llama-tiny", "t5-tiny")}
METHOD = OLora(Lora(RANK, 6.0), lambda1=0.7, lambda2=0.2)


def trees(name, seed):
    model = MODELS[name]
    base = init_base(model)
    trainable = fresh(METHOD, model, base, seed)
    return random_frozen(METHOD, model, base, TASKS, seed), trainable.replace(slot=noise(seed + 5, trainable.slot))


def penalty(frozen, trainable, task, method=METHOD):
    return method.penalty(jax.random.key(0), frozen, trainable, None, at(task))


def overlap_of(frozen, trainable, earlier):
    """Sum over sites, layers and earlier blocks of the absolute entries of A_i^T A_t."""
    total = 0.0
    for site, block in sites(trainable.slot).items():
        stored, own = (np.array(x, np.float64) for x in (sites(frozen.bank)[site]["a"], block["a"]))
        for layer in range(len(own)):
            total += sum(np.abs(stored[layer, :, i].T @ own[layer]).sum() for i in earlier)
    return total


def norms_of(trainable):
    return sum(np.linalg.norm(np.array(layer, np.float64)) for x in jax.tree.leaves(trainable.slot) for layer in x)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("task", [0, 1, 3])
def test_the_penalty_equals_a_loop(name, task):
    frozen, trainable = trees(name, task)
    loss, logs = penalty(frozen, trainable, task)
    overlap, norms = overlap_of(frozen, trainable, range(task)), norms_of(trainable)
    np.testing.assert_allclose(logs["overlap"], overlap, rtol=1e-5)
    np.testing.assert_allclose(logs["norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.7 * overlap + 0.2 * norms, rtol=1e-5)


@pytest.mark.slow
def test_withdrawn_and_later_slots_add_nothing():
    frozen, trainable = trees("llama-tiny", 1)
    frozen = frozen.replace(enabled=jnp.asarray([True, False, True, True]))
    _, logs = penalty(frozen, trainable, 3)
    np.testing.assert_allclose(logs["overlap"], overlap_of(frozen, trainable, (0, 2)), rtol=1e-5)


@pytest.mark.slow
def test_orthogonal_factors_cost_nothing():
    frozen, trainable = trees("llama-tiny", 2)
    stored = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[:, 16:].set(0.0) if path[-1].key == "a" else x, frozen.bank
    )
    own = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[:, :16].set(0.0) if path[-1].key == "a" else x, trainable.slot
    )
    loss, logs = penalty(frozen.replace(bank=stored), trainable.replace(slot=own), 3, OLora(Lora(RANK, 6.0)))
    assert logs["overlap"] == 0 and loss == 0


@pytest.mark.slow
def test_a_fresh_block_has_a_finite_gradient_that_reaches_the_slot_alone():
    frozen, _ = trees("llama-tiny", 3)
    trainable = fresh(METHOD, MODELS["llama-tiny"], frozen.base, 4)

    def loss(bank, slot):
        return penalty(frozen.replace(bank=bank), trainable.replace(slot=slot), 2)[0]

    of_bank, of_slot = jax.grad(loss, argnums=(0, 1))(frozen.bank, trainable.slot)
    assert not any(np.any(x) for x in jax.tree.leaves(of_bank))
    for block in sites(of_slot).values():
        assert np.isfinite(block["a"]).all() and np.any(block["a"])
        assert not np.any(block["b"])


def test_blocks_other_than_lora_are_refused():
    with pytest.raises(ValueError, match="config.method='o_lora' .* set config.pet.kind='lora'"):
        OLora(Prompt(3))
