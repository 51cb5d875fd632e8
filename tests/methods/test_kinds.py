"""Methods learn and answer with both kinds of blocks, or refuse the one that they do not go with."""

import jax
import numpy as np
import pytest

from sapt_jax.methods import METHODS
from sapt_jax.methods.routed import Routed
from sapt_jax.models.families import VARIANTS, make_model, parameters
from sapt_jax.pet import Lora, Prompt
from sapt_jax.programs import make_apply
from sapt_jax.state import abstract
from tests.helpers.tiny import tiny_method
from tests.helpers.training import batch_of
from tests.helpers.trees import at, init_base

KINDS = {"lora": Lora(2, 8.0), "prompt": Prompt(3)}
MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
SPLITS = ("source", "source_mask", "target", "target_mask")
# What learns its blocks alone; the other methods have both kinds in tests of their own.
ROUTED = [name for name, kind in METHODS.items() if issubclass(kind, Routed)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROUTED)
def test_it_learns_and_answers(name, kind):
    """Traced: every gradient has the shape of what is trained, and every answer token has logits."""
    method, batch, apply = tiny_method(name, pet=KINDS[kind]), batch_of(0), make_apply(MODEL)
    frozen = abstract(method.frozen_leaves(parameters(MODEL), 2)).replace(base=jax.eval_shape(lambda: init_base(MODEL)))
    trainable = abstract(method.trainable_leaves(parameters(MODEL)))

    def learn(frozen, trainable):
        def loss(trainable):
            return method.task_loss(apply, jax.random.key(0), frozen, trainable, batch, at(1))[0]

        return jax.grad(loss)(trainable)

    def answer(frozen, trainable):
        features = method.features(apply, frozen.base, batch["source"], batch["source_mask"])
        weights = method.test_weights(frozen, trainable, features, at(1, steps=0))
        mixture = method.mixture(frozen, trainable, weights, at(1, steps=0))
        return apply(frozen.base, *(batch[part] for part in SPLITS), mixture)

    assert jax.tree.map(np.shape, jax.eval_shape(learn, frozen, trainable)) == jax.tree.map(np.shape, trainable)
    assert jax.eval_shape(answer, frozen, trainable).shape[:2] == batch["target"].shape


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].only])
def test_it_refuses_the_other_kind(name):
    (kind, _), (other,) = METHODS[name].only, set(KINDS) - {METHODS[name].only[0]}
    with pytest.raises(ValueError, match=f"config.method='{name}' .*: set config.pet.kind='{kind}'"):
        tiny_method(name, pet=KINDS[other])
