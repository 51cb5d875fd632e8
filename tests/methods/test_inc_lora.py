"""The plain sum of blocks, and that earlier blocks do not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.inc_lora import IncLora
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora
from sapt_jax.programs import make_apply
from tests.helpers.tiny import tiny_method
from tests.helpers.training import batch_of, train
from tests.helpers.trees import at, empty_frozen, fresh, init_base, random_frozen

MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
BASE = init_base(MODEL)


def test_every_block_up_to_the_own_one_has_weight_one():
    method = tiny_method("inc_lora")
    frozen = random_frozen(method, MODEL, BASE, 4, seed=1)
    frozen = frozen.replace(enabled=jnp.asarray([True, False, True, True]))
    weights = method.weights(frozen, fresh(method, MODEL, BASE, 0), jnp.zeros((2, 5)), at(2), training=False)
    assert weights.tolist() == [[1.0, 0.0, 1.0, 0.0]] * 2


@pytest.mark.slow
def test_the_answer_is_that_of_merged_weights():
    """W + s (A_0 B_0 + A_1 B_1 + A_2 B_2) in the place of every adapted W."""
    method = IncLora(Lora(2, 8.0))
    frozen, trainable = random_frozen(method, MODEL, BASE, 3, seed=2), fresh(method, MODEL, BASE, 4)
    trainable = trainable.replace(slot=jax.tree.map(lambda x: x + 0.1, trainable.slot))
    batch = batch_of(5)
    weights = method.weights(frozen, trainable, jnp.zeros((3, 1)), at(2), training=True)
    apply = make_apply(MODEL)
    found = apply(
        BASE,
        *(batch[n] for n in ("source", "source_mask", "target", "target_mask")),
        method.mixture(frozen, trainable, weights, at(2)),
    )
    bank = method.pet.write(frozen.bank, trainable.slot, 2)
    merged = jax.tree.map(jnp.copy, BASE)
    attention = merged["decoder"]["layers"]["self_attention"]
    for name, block in bank["decoder"]["layers"]["self_attention"].items():
        delta = np.einsum("KDTR,KTRH->KDH", np.array(block["a"], np.float64), np.array(block["b"], np.float64))
        attention[name]["kernel"] = attention[name]["kernel"] + jnp.asarray(4.0 * delta, jnp.float32)
    expected = apply(merged, *(batch[n] for n in ("source", "source_mask", "target", "target_mask")))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_a_later_task_leaves_earlier_blocks_as_they_are():
    method = tiny_method("inc_lora")
    frozen = empty_frozen(method, MODEL, BASE, 3)
    trainable = None
    for task in range(3):
        start = fresh(method, MODEL, BASE, task, previous=trainable)
        trainable, _ = train(method, MODEL, (frozen, start), at(task), steps=1)
        after = method.end_task(frozen, trainable, None, at(task))
        for earlier in range(task):
            jax.tree.map(
                np.testing.assert_array_equal,
                method.pet.read(after.bank, earlier),
                method.pet.read(frozen.bank, earlier),
            )
        frozen = after
