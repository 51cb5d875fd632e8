"""Beam search against every possible answer, a written-out search and transformers, on both model families."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from sapt_jax.decoding.answers import Ends, Search, make_generate
from sapt_jax.decoding.beam_search import beam_search
from sapt_jax.models.llama import Cache, Llama
from sapt_jax.models.shapes import LlamaConfig, T5Config
from sapt_jax.models.t5 import T5
from sapt_jax.programs import make_apply
from tests.helpers.tiny import tiny_method
from tests.helpers.trees import at, fresh, noise, random_frozen

pytestmark = pytest.mark.slow

VOCAB, EOS, PAD, ROWS = 5, 1, 0, 3
LLAMA = LlamaConfig(VOCAB, 8, 2, 2, 1, 4, 12, 1e-5, 100.0, (), 64, True)
T5_SHAPE = T5Config(VOCAB, 8, 1, 2, 2, 6, 12, "relu", False, 1e-6, 8, 12, True)
MODELS = {"llama": Llama(LLAMA, jnp.float32, "none"), "t5": T5(T5_SHAPE, jnp.float32, "none")}


@functools.cache
def make_params(family, seed):
    model = MODELS[family]
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.7, x.dtype), shapes)


def make_source(family, seed):
    rng = np.random.default_rng(seed)
    mask = np.arange(6) < np.array([[6], [4], [3]])
    mask = mask[:, ::-1] if family == "llama" else mask
    return np.where(mask, rng.integers(2, VOCAB, (ROWS, 6)), PAD).astype(np.int32), mask


def search(family, params, source, source_mask, width, alpha, new_tokens, done=(False,) * ROWS):
    return _search(family, params, source, source_mask, width, alpha, new_tokens, np.array(done))


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def _search(family, params, source, source_mask, width, alpha, new_tokens, done):
    model, variables = MODELS[family], {"params": params}
    logits, cache = model.apply(variables, source, source_mask, new_tokens, method="prefill")

    def decode_step(tokens, cache):
        return model.apply(variables, tokens, cache, method="decode_step")

    return beam_search(decode_step, logits, cache, done, width, alpha, new_tokens, EOS, PAD)


def log_probs_of(family, params, source, source_mask, answers, mixtures=None):
    """Log-probability [B, M, N] of each token of answers [M, N], by teacher forcing."""
    model, every = MODELS[family], len(answers)

    @jax.jit
    def forced(source, source_mask, mixture):
        target = jnp.asarray(answers)
        source = jnp.broadcast_to(source, (every, *source.shape))
        source_mask = jnp.broadcast_to(source_mask, (every, *source_mask.shape))
        ones = jnp.ones_like(target, bool)
        logits = model.apply({"params": params}, source, source_mask, target, ones, mixture)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]

    mixtures = mixtures or [None] * len(source)
    return np.stack([forced(*row) for row in zip(source, source_mask, mixtures, strict=True)])


def every_finished_answer(new_tokens):
    """All answers that end within `new_tokens`, padded, and their lengths with the end token."""
    others = [token for token in range(VOCAB) if token != EOS]
    answers = [
        (*body, EOS, *[PAD] * (new_tokens - length - 1))
        for length in range(new_tokens)
        for body in itertools.product(others, repeat=length)
    ]
    lengths = [length + 1 for length in range(new_tokens) for _ in itertools.product(others, repeat=length)]
    return np.array(answers), np.array(lengths)


@pytest.mark.parametrize("family", MODELS)
def test_a_wide_search_finds_the_best_of_all_answers(family):
    new_tokens, width = 4, 64
    params, (source, mask) = make_params(family, seed=1), make_source(family, seed=2)
    answers, lengths = every_finished_answer(new_tokens)
    log_probs = log_probs_of(family, params, source, mask, answers)
    log_probs = np.where(np.arange(new_tokens) < lengths[:, None], log_probs, 0).sum(axis=-1)
    for alpha in (0.0, 0.6, 2.0):
        scores = log_probs / ((5 + lengths) / 6) ** alpha
        order = np.argsort(-scores, axis=1)[:, :10]
        found, found_scores = search(family, params, source, mask, width, alpha, new_tokens)
        np.testing.assert_allclose(found_scores[:, :10], np.take_along_axis(scores, order, axis=1), atol=1e-4)
        np.testing.assert_array_equal(found[:, :10], answers[order])


def written_out_search(next_log_probs, width, alpha, new_tokens):
    """The same search on Python lists, without a stopping rule: answers and scores, best first."""
    live, finished = [((), 0.0)], []
    for length in range(1, new_tokens + 1):
        candidates = [
            ((*prefix, token), total + step)
            for prefix, total in live
            for token, step in enumerate(next_log_probs(prefix))
        ]
        candidates = sorted(candidates, key=lambda one: -one[1])[: 2 * width]
        penalty = ((5 + length) / 6) ** alpha
        finished += [(answer, total / penalty) for answer, total in candidates if answer[-1] == EOS]
        finished = sorted(finished, key=lambda one: -one[1])[:width]
        live = [one for one in candidates if one[0][-1] != EOS][:width]
    return finished or [(answer, total / penalty) for answer, total in live]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("width", "alpha", "new_tokens"), ((1, 0.6, 6), (2, 0.0, 6), (3, 1.0, 6), (2, 0.6, 1)))
def test_equals_a_written_out_search(family, width, alpha, new_tokens):
    params, (source, mask) = make_params(family, seed=3), make_source(family, seed=4)
    found, scores = search(family, params, source, mask, width, alpha, new_tokens)

    @jax.jit
    def last_logits(source, mask, prefix, length):
        target = jnp.asarray(prefix)[None]
        logits = MODELS[family].apply({"params": params}, source[None], mask[None], target, target >= 0)
        return jax.nn.log_softmax(logits[0, length])

    for row in range(ROWS):

        def next_log_probs(prefix, row=row):
            padded = np.array([*prefix, *[PAD] * (new_tokens - len(prefix))])
            return np.asarray(last_logits(source[row], mask[row], padded, len(prefix)))

        want = written_out_search(next_log_probs, width, alpha, new_tokens)
        for place, (answer, score) in enumerate(want):
            padded = [*answer, *[PAD] * (new_tokens - len(answer))]
            np.testing.assert_array_equal(found[row, place], padded)
            assert scores[row, place] == pytest.approx(score, abs=1e-4)
        assert np.isneginf(scores[row, len(want) :]).all()


def test_stops_when_no_answer_can_improve():
    """The end token is nearly certain at first: the model is never run again."""
    steps = []

    def decode_step(tokens, cache):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.zeros((2, VOCAB)), cache

    def search_from(end_logit):
        logits = jnp.zeros((2, VOCAB)).at[:, EOS].set(end_logit)
        found, _ = beam_search(decode_step, logits, no_cache(2), jnp.zeros(2, bool), 1, 0.6, 9, EOS, PAD)
        jax.effects_barrier()
        return found

    np.testing.assert_array_equal(search_from(9.0)[:, 0, :2], [[EOS, PAD]] * 2)
    assert len(steps) == 0
    search_from(-9.0)
    assert len(steps) > 0


def no_cache(rows):
    array = jnp.zeros((1, rows, 3, 1, 1))
    return Cache(array, array, jnp.zeros((rows, 3), bool), jnp.zeros(rows, jnp.int32), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("family", MODELS)
def test_rows_that_need_no_answer_stay_empty_and_others_as_they_were(family):
    params, (source, mask) = make_params(family, seed=5), make_source(family, seed=6)
    plain, _ = search(family, params, source, mask, 2, 0.6, 6)
    done = (False, True, False)
    found, _ = search(family, params, source, mask, 2, 0.6, 6, done)
    np.testing.assert_array_equal(found[1], np.full((2, 6), PAD))
    np.testing.assert_array_equal(found[::2], plain[::2])


@pytest.mark.parametrize("family", MODELS)
def test_generate_finds_the_best_answer_under_each_rows_mixture(family):
    model, params = MODELS[family], make_params(family, seed=9)
    method = tiny_method()
    frozen = random_frozen(method, model, params, 3, seed=13, scale=0.5)
    trainable = fresh(method, model, params, 11)
    trainable = trainable.replace(slot=noise(14, trainable.slot, 0.5))
    source, mask = make_source(family, seed=12)
    mask[1] = False
    new_tokens, alpha, task = 3, 0.6, at(2)
    generate = make_generate(make_apply(model), method, Ends(new_tokens, EOS, PAD), Search(16, alpha))
    found, weights = generate(frozen, trainable, source, mask, task)

    mixtures = [method.mixture(frozen, trainable, row[None], task) for row in weights]
    answers, lengths = every_finished_answer(new_tokens)
    mixtures = [mixture.replace(columns=jnp.repeat(mixture.columns, len(answers), axis=0)) for mixture in mixtures]
    log_probs = log_probs_of(family, frozen.base, source, mask, answers, mixtures)
    log_probs = np.where(np.arange(new_tokens) < lengths[:, None], log_probs, 0).sum(axis=-1)
    best = answers[np.argmax(log_probs / ((5 + lengths) / 6) ** alpha, axis=1)]
    np.testing.assert_array_equal(found[::2], best[::2])
    assert (found[1] == PAD).all()


def test_matches_transformers():
    """Without a length penalty both search for the most likely answer, and T5X's way of it finds no worse one.

    They differ where transformers does not let an answer end, since the end token is not among the `width` best tokens;
    T5X takes twice as many.
    """
    width = 12
    from sapt_jax.models.shapes import t5_config_from_hf
    from sapt_jax.pretrained import rules, t5_weights
    from tests.helpers.t5_reference import make_batch, make_reference, torch

    reference = make_reference("v1.1", seed=7, vocab_size=12, num_decoder_layers=2)
    with torch.no_grad():
        # Flatter distributions, so that short answers are worth ending.
        reference.lm_head.weight *= 0.8
    config = {**reference.config.to_dict(), "tie_word_embeddings": False, "model_type": "t5"}
    model = T5(t5_config_from_hf(config), jnp.float32, "none")
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    target = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])
    arrays = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    variables = {"params": rules.load(rules.ArraySource("reference", arrays), t5_weights.hf_table(config), target)}

    batch, new_tokens = make_batch(seed=8, rows=30, vocab=12), 12

    @jax.jit
    def ours(source, source_mask):
        logits, cache = model.apply(variables, source, source_mask, new_tokens, method="prefill")
        step = functools.partial(model.apply, variables, method="decode_step")
        return beam_search(step, logits, cache, jnp.zeros(30, bool), width, 0.0, new_tokens, EOS, PAD)

    found, scores = ours(batch["source"], batch["source_mask"])
    with torch.no_grad():
        want = reference.generate(
            input_ids=torch.tensor(batch["source"], dtype=torch.long),
            attention_mask=torch.tensor(batch["source_mask"]).long(),
            max_new_tokens=new_tokens,
            num_beams=width,
            length_penalty=0.0,
            early_stopping=False,
            do_sample=False,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
    answers, scores = want.sequences.numpy()[:, 1:], np.asarray(scores)[:, 0]
    is_end = answers == EOS
    answers = np.where(np.cumsum(is_end, axis=1) > is_end, PAD, answers)
    answers = np.pad(answers, ((0, 0), (0, new_tokens - answers.shape[1])))
    ended = is_end.any(axis=1)
    same = ended & (np.abs(scores - want.sequences_scores.numpy()) < 1e-4)
    assert same.sum() >= 10 and len({tuple(answer) for answer in answers[same]}) >= 3
    np.testing.assert_array_equal(np.asarray(found)[same, 0], answers[same])
    assert (scores[ended] > want.sequences_scores.numpy()[ended] - 1e-4).all()
