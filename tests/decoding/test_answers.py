"""Greedy decoding: when it stops, what it leaves in ended and filler rows, and that the cache changes no token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sapt_jax.decoding.answers import Ends, Sampling, Search, make_generate, make_sample
from sapt_jax.decoding.greedy import extend_until_end, most_likely
from sapt_jax.decoding.sampling import draw, draw_apart
from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import LLAMA_VARIANTS
from sapt_jax.programs import make_apply
from tests.helpers.tiny import tiny_method
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

VOCAB, EOS, PAD = 7, 1, 0
CONFIG = dataclasses.replace(LLAMA_VARIANTS["llama-tiny"], vocab_size=31, d_model=16, d_ff=16)


class Script:
    """A model that says `tokens` [B, N] whatever it hears; `heard` holds what each decode step was given."""

    def __init__(self, tokens):
        rng = np.random.default_rng(tokens.size)
        self.tokens, self.heard = tokens, []
        self.logits = jnp.asarray(np.eye(VOCAB)[tokens.T] + 0.9 * rng.random((*tokens.T.shape, VOCAB)))

    def decode_step(self, token, column):
        self.heard.append(token)
        return self.logits[column + 1], column + 1

    def decode(self, done, pad_id=PAD):
        start = jnp.zeros((), jnp.int32)
        ends = (self.tokens.shape[1], EOS, pad_id)
        return extend_until_end(self.decode_step, most_likely, self.logits[0], start, jnp.asarray(done), *ends)


@pytest.fixture
def counted():
    """Without jit the while_loop is Python's, and its steps can be counted."""
    with jax.disable_jit():
        yield


def spoken(row, done):
    """The tokens of a row up to its end token, then padding."""
    ends = np.flatnonzero(row == EOS)
    length = 0 if done else ends[0] + 1 if ends.size else len(row)
    return np.where(np.arange(len(row)) < length, row, PAD), length


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_rows_end_at_their_end_token_and_the_loop_with_the_last_row(seed, counted):
    rng = np.random.default_rng(seed)
    script = Script(rng.integers(1, VOCAB, (4, 9)))
    done = rng.random(4) < 0.3
    got = script.decode(done)
    rows, lengths = zip(*(spoken(row, own) for row, own in zip(script.tokens, done, strict=True)), strict=True)
    np.testing.assert_array_equal(got, rows)
    assert len(script.heard) == max(max(lengths) - 1, 0)
    for index, heard in enumerate(script.heard):
        np.testing.assert_array_equal(heard, got[:, index])


def test_all_rows_filler_takes_no_step(counted):
    script = Script(np.full((2, 5), 3))
    assert (script.decode(np.array([True, True])) == PAD).all() and not script.heard


def test_a_row_that_ends_at_once_takes_no_step(counted):
    script = Script(np.array([[EOS, 3, 3], [EOS, 4, 4]]))
    np.testing.assert_array_equal(script.decode(np.zeros(2, bool)), [[EOS, PAD, PAD]] * 2)
    assert not script.heard


def test_one_new_token_takes_no_step(counted):
    script = Script(np.array([[3], [4]]))
    np.testing.assert_array_equal(script.decode(np.zeros(2, bool)), [[3], [4]])
    assert not script.heard


def test_padding_may_be_the_end_token():
    script = Script(np.array([[3, EOS, 4], [4, 5, 6]]))
    got = jax.jit(lambda: script.decode(np.zeros(2, bool), pad_id=EOS))()
    np.testing.assert_array_equal(got, [[3, EOS, EOS], [4, 5, 6]])


@pytest.fixture(scope="module")
def learned():
    """(model, method, frozen with two learned tasks, trainable of the third)"""
    model, method = Llama(CONFIG, jnp.float32, "none"), tiny_method()
    base = init_base(model)
    trainable = fresh(method, model, base, 1)
    frozen = random_frozen(method, model, base, 4, seed=2, scale=0.5)
    return model, method, frozen, trainable.replace(slot=noise(5, trainable.slot, 0.5))


@pytest.mark.slow
def test_generate_equals_a_full_forward_pass_for_every_token(learned):
    model, method, frozen, trainable = learned
    rng = np.random.default_rng(3)
    mask = np.arange(8) >= np.array([0, 5, 3, 8])[:, None]
    source = np.where(mask, rng.integers(2, 31, mask.shape), PAD).astype(np.int32)
    steps = 6
    tokens, weights = make_generate(make_apply(model), method, Ends(steps, -1, PAD), Search())(
        frozen, trainable, source, mask, at(2)
    )

    assert weights.shape == (4, 4) and (weights[:, 3] == 0).all() and (weights[:, :3] > 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    mixture = method.mixture(frozen, trainable, weights, at(2))
    variables = {"params": frozen.base}
    forced = jax.jit(model.apply)(variables, source, mask, tokens, np.ones((4, steps), bool), mixture)
    np.testing.assert_array_equal(tokens[:3], jnp.argmax(forced, axis=-1)[:3])
    assert (tokens[3] == PAD).all()
    assert len(np.unique(tokens[:3])) > 3


def frequencies(seed, logits, draws=4000, **settings):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    drawn = jax.jit(lambda rng: draw(rng, rows, **settings))(jax.random.key(seed))
    return np.bincount(drawn, minlength=len(logits)) / draws


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.5, "top_k": 4, "top_p": 1.0},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.7},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.8},
    ],
)
def test_draws_follow_the_distribution_of_transformers(settings):
    """Its temperature, top-k and top-p warpers, in that order. Within 4 standard errors of 4,000 draws."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(4).normal(0, 1.5, 9)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if settings["top_k"]:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if settings["top_p"] < 1:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    expected = torch.softmax(warpers(None, torch.tensor(logits)[None]), dim=-1)[0].numpy()
    found = frequencies(5, logits, **settings)
    assert ((found > 0) == (expected > 0)).all()
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 4000)).all()


@pytest.mark.slow
def test_rows_are_drawn_apart_with_temperatures_and_nuclei_of_their_own():
    """Each row as if it were drawn alone, and as `draw` with its own settings would."""
    rng = np.random.default_rng(8)
    logits = jnp.asarray(rng.normal(0, 1.5, (5, 9)), jnp.float32)
    keys, hot = jax.random.split(jax.random.key(9), 5), jnp.asarray(rng.uniform(0.3, 2, 5), jnp.float32)
    nuclei = jnp.asarray(rng.uniform(0.4, 1, 5), jnp.float32)
    together = draw_apart(keys, logits, hot, nuclei)
    for row in range(5):
        assert together[row] == draw(keys[row], logits[row : row + 1], hot[row], 0, nuclei[row])[0]


@pytest.mark.slow
def test_samples_depend_on_the_key_alone_and_differ_between_equal_sources(learned):
    model, method, frozen, trainable = learned
    source = np.tile(np.array([[3, 4, 5, 6]], np.int32), (4, 1))
    mask = np.array([[True] * 4] * 3 + [[False] * 4])
    sample = make_sample(make_apply(model), method, Ends(8, EOS, PAD), Sampling())
    arguments = (frozen, trainable, source, mask, at(2))
    first, again, other = (np.array(sample(*arguments, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first[3] == PAD).all() and len({tuple(row) for row in first[:3]}) == 3
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_sampling_one_token_alone_is_greedy(learned):
    model, method, frozen, trainable = learned
    source = np.random.default_rng(6).integers(2, 31, (3, 5)).astype(np.int32)
    arguments = (frozen, trainable, source, np.ones((3, 5), bool), at(2))
    apply, ends = make_apply(model), Ends(6, -1, PAD)
    sampled = make_sample(apply, method, ends, Sampling(top_k=1))(*arguments, jax.random.key(0))
    np.testing.assert_array_equal(sampled, make_generate(apply, method, ends, Search())(*arguments)[0])
