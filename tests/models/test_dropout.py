"""T5's dropout: where and how often it drops, that it draws anew or again as its key says, and only in training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.config import default_config
from sapt_jax.decoding.answers import Ends
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.models.layers import Attention, GatedMlp, drop
from sapt_jax.models.shapes import t5_config_from_hf
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from sapt_jax.programs import make_apply, make_programs
from sapt_jax.sharding import make_mesh
from tests.helpers.t5_reference import make_batch, make_reference, save, torch
from tests.helpers.tiny import tiny_method
from tests.helpers.trees import at, init_base, random_frozen

pytestmark = pytest.mark.slow

RATE = 0.3
TINY = make_model(VARIANTS["t5-tiny"], "float32", "none", dropout=RATE)


class Twice(nn.Module):
    """What `drop` leaves of ones, two times in each of three layers."""

    @nn.compact
    def __call__(self, x):
        def layer(module, carry, _):
            return carry, (drop(module, RATE, x), drop(module, RATE, x))

        return nn.scan(layer, split_rngs={"dropout": True}, length=3)(self, None, None)[1]


def test_entries_are_dropped_at_the_rate_and_each_time_anew():
    first, second = Twice().apply({}, jnp.ones((100, 200)), rngs={"dropout": jax.random.key(0)})
    draws = [*first, *second]
    for draw in draws:
        np.testing.assert_allclose(np.unique(draw), [0, 1 / (1 - RATE)], rtol=1e-6)
        np.testing.assert_allclose(np.mean(draw == 0), RATE, atol=0.015)
    for number, draw in enumerate(draws):
        for other in draws[:number]:
            # Two that know nothing of each other drop an entry both at the rate squared.
            np.testing.assert_allclose(np.mean((draw == 0) & (other == 0)), RATE**2, atol=0.015)


@pytest.mark.parametrize("part", ["attention weights", "hidden layer"])
def test_the_mean_of_many_draws_is_what_comes_out_without(part):
    """What is dropped enters linearly: rows that are all alike are as many draws."""
    rng, rows, length, width = np.random.default_rng(1), 20000, 3, 8
    one = jnp.asarray(rng.normal(size=(1, length, width)), jnp.float32)
    if part == "attention weights":
        module = Attention(2, 2, 4, width, 1.0, jnp.float32, dropout=RATE)
        query, key, value = (jnp.asarray(rng.normal(size=(1, length, 2, 4)), jnp.float32) for _ in range(3))
        bias = jnp.asarray(rng.normal(size=(1, 2, length, length)), jnp.float32)
        mask = jnp.asarray([[True, True, False]])[:, None, None]
        inputs = (query, key, value, mask, bias)
        variables, method = {}, Attention.attend
        many = tuple(jnp.repeat(x, rows, axis=0) for x in inputs)
    else:
        module, method = GatedMlp(16, nn.gelu, jnp.float32, dropout=RATE), None
        variables = nn.meta.unbox(module.init(jax.random.key(2), one))
        inputs, many = (one,), (jnp.repeat(one, rows, axis=0),)
    without = module.apply(variables, *inputs, method=method)[0]
    draws = module.apply(variables, *many, method=method, rngs={"dropout": jax.random.key(3)})
    spread = np.std(draws, axis=0)
    assert spread.max() > 0.1
    assert np.all(np.abs(np.mean(draws, axis=0) - without) < 5 * spread / rows**0.5 + 1e-5)


@pytest.mark.parametrize("generation", ["v1.0", pytest.param("v1.1", marks=pytest.mark.slow)])
def test_logits_spread_as_those_of_transformers_in_training(generation, tmp_path):
    """Mean and spread of every logit over many draws, so that the places of dropout are those of PyTorch's T5."""
    reference, rows = make_reference(generation, seed=4, dropout_rate=RATE), 6000
    path = save(reference, tmp_path)
    model = T5(t5_config_from_hf(read_model_config(path)), jnp.float32, "none", RATE)
    ids = jnp.zeros((1, 2), jnp.int32)
    like = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0, ids, ids == 0)["params"])
    params = load_pretrained(path, like)
    batch = {k: np.repeat(v[:1], rows, axis=0) for k, v in make_batch(5, 2, 5, 3).items()}
    found = jax.jit(make_apply(model))(params, *batch.values(), rng=jax.random.key(6))
    with torch.no_grad():
        source, labels = (torch.tensor(batch[k], dtype=torch.long) for k in ("source", "target"))
        want = reference.train()(input_ids=source, labels=labels).logits.numpy()
    spread = want.std(axis=0)
    np.testing.assert_allclose(np.std(found, axis=0), spread, rtol=0.08)
    assert np.all(np.abs(np.mean(found, axis=0) - want.mean(axis=0)) < 6 * spread * (2 / rows) ** 0.5)


@functools.cache
def tiny_parts():
    method = tiny_method()
    base = init_base(TINY)
    return method, random_frozen(method, TINY, base, 2, seed=7), make_batch(8, vocab=VARIANTS["t5-tiny"].vocab_size)


def loss_and_gradient(model, key):
    method, frozen, batch = tiny_parts()
    bank = frozen.bank

    def loss(bank):
        mixture = method.pet.mix(bank, jnp.full((len(batch["source"]), 2), 0.5), 1)
        logits = make_apply(model)(frozen.base, *batch.values(), mixture, rng=key)
        return jnp.mean(jnp.square(logits))

    return jax.jit(jax.value_and_grad(loss))(bank)


def test_what_is_computed_again_is_dropped_again():
    plain = loss_and_gradient(TINY, jax.random.key(9))
    for remat in ("full", "dots"):
        again = loss_and_gradient(make_model(VARIANTS["t5-tiny"], "float32", remat, dropout=RATE), jax.random.key(9))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), again, plain)
    assert loss_and_gradient(TINY, jax.random.key(10))[0] != plain[0]


def programs_of(dropout):
    config = default_config()
    config.model.dropout = dropout
    model = make_model(VARIANTS["t5-tiny"], "float32", "none", dropout=dropout)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return make_programs(config, model, tiny_method(kl_ratio=0.0), mesh, Ends(3, 1, 0))


def traced(programs, name, *arguments):
    return str(jax.make_jaxpr(getattr(programs, name))(*arguments))


def test_only_the_training_step_draws_and_without_a_rate_nothing_does():
    _, frozen, batch = tiny_parts()
    drawn = {}
    for rate in (0.0, RATE):
        programs = programs_of(rate)
        trainable = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), programs.state.trainable)
        state = programs.open_state(trainable)
        source = batch["source"], batch["source_mask"]
        texts = {
            "train_step": traced(programs, "train_step", frozen, state, batch, None, at(1)),
            "generate": traced(programs, "generate", frozen, trainable, *source, at(1)),
            "weights": traced(programs, "weights", frozen, trainable, *source, at(1)),
            "measure": traced(programs, "measure", frozen, trainable, batch, at(1)),
        }
        drawn[rate] = {name for name, text in texts.items() if "random_bits" in text}
    assert drawn == {0.0: set(), RATE: {"train_step"}}


def test_a_step_drops_by_its_number_alone():
    _, frozen, batch = tiny_parts()
    programs = programs_of(RATE)
    trainable = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), programs.state.trainable)

    def loss(number):
        state = programs.open_state(jax.tree.map(jnp.copy, trainable)).replace(step=jnp.int32(number))
        return float(programs.train_step(frozen, state, batch, None, at(1))[1]["loss"])

    assert loss(3) == loss(3) != loss(4)


def test_a_rate_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="config.model.dropout=0.1 for LLaMA must be 0: the architecture has no drop"):
        make_model(VARIANTS["llama-tiny"], "float32", "none", dropout=0.1)
    with pytest.raises(ValueError, match="config.model.dropout=1.0 for T5 must be a rate from 0 to less than 1"):
        make_model(VARIANTS["t5-tiny"], "float32", "none", dropout=1.0)
