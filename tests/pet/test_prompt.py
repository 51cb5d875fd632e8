"""Soft prompts in both model families, against PyTorch transformers in float64 with the prompt as input embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from sapt_jax import pet
from sapt_jax.models.llama import Llama, positions_of
from sapt_jax.models.shapes import llama_config_from_hf, t5_config_from_hf
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from tests.helpers import llama_reference, t5_reference

pytestmark = pytest.mark.slow

PROMPT = pet.Prompt(length=5)
STEPS = 6
FAMILIES = {
    "llama": (llama_reference, "grouped, tied", Llama, llama_config_from_hf),
    "t5 v1.0": (t5_reference, "v1.0", T5, t5_config_from_hf),
    "t5 v1.1": (t5_reference, "v1.1", T5, t5_config_from_hf),
    "umt5": (t5_reference, "umt5", T5, t5_config_from_hf),
}


def load(family, folder, seed):
    """(reference in float64, our model, its parameters, a batch of three rows)"""
    module, kind, model_class, read = FAMILIES[family]
    reference = module.make_reference(kind, seed)
    reference.save_pretrained(folder)
    model = model_class(read(read_model_config(folder)), jnp.float32, "none")
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    abstract = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])
    return reference.double(), model, load_pretrained(folder, abstract), module.make_batch(seed + 1)


def make_mixture(params, seed, rows):
    """The mixture of three prompts, and the same as a loop in float64 [rows, P, D]."""
    rng = np.random.default_rng(seed)
    shape = (3, PROMPT.length, params["token_embedder"]["embedding"].shape[1])
    bank = {"prompt": jnp.asarray(rng.standard_normal(shape), jnp.float32)}
    weights = rng.dirichlet(np.ones(3), rows)
    written_out = [sum(w * np.array(bank["prompt"][t], np.float64) for t, w in enumerate(row)) for row in weights]
    return PROMPT.mix(bank, jnp.asarray(weights, jnp.float32), 0), np.stack(written_out)


def reference_row(reference, batch, prompt, row):
    """transformers on one row without padding: (logits of the target [L, V], greedy tokens after the source)."""
    source = torch.tensor(batch["source"][row][batch["source_mask"][row]]).long()
    target = torch.tensor(batch["target"][row][batch["target_mask"][row]]).long()
    table = reference.get_input_embeddings().weight
    embedded = torch.cat([torch.tensor(prompt), table[source]])[None]
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["use_cache"] = False
    with torch.no_grad():
        mask = torch.ones(embedded.shape[:2]).long()
        tokens = reference.generate(inputs_embeds=embedded, attention_mask=mask, **settings)[0]
        if reference.config.is_encoder_decoder:
            return reference(inputs_embeds=embedded, labels=target[None]).logits[0].numpy(), tokens[1:].numpy()
        whole = torch.cat([embedded[0], table[target]])[None]
        return reference(inputs_embeds=whole).logits[0, embedded.shape[1] - 1 : -1].numpy(), tokens.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_decoding_match_transformers(family, tmp_path):
    reference, model, params, batch = load(family, tmp_path, seed=3)
    mixture, prompts = make_mixture(params, seed=5, rows=3)
    variables = {"params": params}
    found = jax.jit(model.apply)(variables, **batch, pet=mixture)
    plain = jax.jit(model.apply)(variables, **batch)

    @jax.jit
    def decode(source, source_mask):
        def step(state, _):
            logits, cache = state
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return model.apply(variables, token, cache, mixture.for_answers(1), method="decode_step"), token

        start = model.apply(variables, source, source_mask, STEPS, mixture, method="prefill")
        return jax.lax.scan(step, start, length=STEPS)[1].T

    tokens = decode(batch["source"], batch["source_mask"])
    for row in range(3):
        expected, expected_tokens = reference_row(reference, batch, prompts[row], row)
        length = batch["target_mask"][row].sum()
        np.testing.assert_allclose(found[row, :length], expected, atol=1e-4, rtol=0)
        assert np.abs(plain[row, :length] - expected).max() > 0.05
        np.testing.assert_array_equal(tokens[row], expected_tokens)


@pytest.mark.parametrize("family", ["llama", "t5 v1.1"])
def test_gradients_reach_every_prompt(family, tmp_path):
    _, model, params, batch = load(family, tmp_path, seed=7)
    bank = {"prompt": jnp.asarray(np.random.default_rng(8).standard_normal((3, 5, model.config.d_model)), jnp.float32)}
    weights = jnp.full((3, 3), 1 / 3)

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(bank, weights):
        logits = model.apply({"params": params}, **batch, pet=PROMPT.mix(bank, weights, 0))
        return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

    of_bank, of_weights = jax.jit(gradients)(bank, weights)
    assert (np.abs(of_bank["prompt"]) > 0).all()
    assert (np.abs(of_weights) > 0).all()


def test_prompt_takes_the_first_positions_whatever_the_padding():
    mask = np.array([[False, False, True, True], [True, True, True, True]])
    embeddings = jnp.zeros((2, 4, 3))
    _, valid = pet.put_prompt_before(pet.Mixture(prompt=jnp.ones((2, 5, 3))), embeddings, jnp.asarray(mask))
    positions = np.array(positions_of(valid))
    assert positions[:, :5].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert positions[0, 7:].tolist() == [5, 6] and positions[1, 5:].tolist() == [5, 6, 7, 8]
    assert valid[0].tolist() == [True] * 5 + [False, False, True, True]


def idle(rng, model, seen):
    """A mixture of prompts before three rows, of which `seen` (a list of three numbers) take part, and the same ones
    without the others."""
    vectors = jnp.asarray(rng.standard_normal((3, 7, model.config.d_model)), jnp.float32)
    mask = jnp.arange(7) >= 7 - jnp.asarray(seen)[:, None]
    alone = [pet.Mixture(prompt=vectors[row : row + 1, 7 - count :]) for row, count in enumerate(seen)]
    return pet.Mixture(prompt=vectors, prompt_mask=mask), alone


@pytest.mark.parametrize("family", ["llama", "t5 v1.1", "umt5"])
def test_vectors_that_take_no_part_change_nothing(family, tmp_path):
    _, model, params, batch = load(family, tmp_path, seed=9)
    mixture, alone = idle(np.random.default_rng(10), model, seen=[2, 7, 4])

    def read(source, source_mask, target, target_mask, mixture):
        variables = {"params": params}
        taught = model.apply(variables, source, source_mask, target, target_mask, mixture)
        logits, cache = model.apply(variables, source, source_mask, 2, mixture, method="prefill")
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return taught, logits, model.apply(variables, token, cache, mixture.for_answers(1), method="decode_step")[0]

    inputs = [batch[name] for name in ("source", "source_mask", "target", "target_mask")]
    found = jax.jit(read)(*inputs, mixture)
    for row in range(3):
        expected = jax.jit(read)(*(x[row : row + 1] for x in inputs), alone[row])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], atol=2e-5)


def test_positions_count_the_vectors_that_take_part():
    mixture = pet.Mixture(prompt=jnp.ones((2, 3, 4)), prompt_mask=jnp.asarray([[False, True, True], [True] * 3]))
    _, valid = pet.put_prompt_before(mixture, jnp.zeros((2, 2, 4)), jnp.asarray([[False, True], [True, True]]))
    assert positions_of(valid).tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 3, 4]]
