"""LLaMA against PyTorch transformers in every kind, and its own invariants: padding, caching, remat, LoRA, config."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from sapt_jax import pet
from sapt_jax.decoding.greedy import extend_until_end, most_likely
from sapt_jax.methods.losses import token_cross_entropy
from sapt_jax.models.llama import ACTIVATIONS, Llama
from sapt_jax.models.shapes import LLAMA_VARIANTS, LlamaConfig, llama_config_from_hf
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from tests.helpers.llama_reference import KINDS, VOCAB, make_batch, make_reference, reference_logits, reference_tokens
from tests.helpers.trees import random_bank

CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=20,
    norm_eps=1e-5,
    rope_theta=100.0,
    rope_scaling=(),
    max_positions=64,
    tie_embeddings=False,
)
GOOD = {
    "model_type": "llama", "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    "max_position_embeddings": 64,
}  # fmt: skip


def abstract_params(model):
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])


def make_model(config, seed, dtype=jnp.float32, remat="none"):
    """A model and random parameters, norms included."""
    model = Llama(config, dtype, remat)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if "scale" in jax.tree_util.keystr(path):
            return jnp.asarray(1 + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape) / leaf.shape[-2] ** 0.5, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(model))
    embedding = rng.standard_normal((config.vocab_size, config.d_model))
    return model, {**params, "token_embedder": {"embedding": jnp.asarray(embedding, jnp.float32)}}


LORA = pet.Lora(rank=2, alpha=4.0)


def make_bank(config, seed, tasks=3):
    return random_bank(LORA, Llama(config, jnp.float32, "none"), tasks, seed)


def make_mixture(config, seed, rows=3):
    weights = np.random.default_rng(seed).dirichlet(np.ones(3), rows)
    return LORA.mix(make_bank(config, seed), jnp.asarray(weights, jnp.float32), 0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch, mixture=None):
    return model.apply({"params": params}, **batch, pet=mixture)


def decode(model, params, batch, tokens, mixture=None):
    """Logits [B, steps, V] of prefill, then of decode_step fed with `tokens` [B, steps - 1]."""
    steps = tokens.shape[1] + 1

    @jax.jit
    def run(params, source, source_mask, tokens, mixture):
        apply = functools.partial(model.apply, {"params": params})
        first, cache = apply(source, source_mask, steps, mixture, method="prefill")

        def step(cache, token):
            logits, cache = apply(token, cache, mixture, method="decode_step")
            return cache, logits

        _, rest = jax.lax.scan(step, cache, tokens.T)
        return jnp.concatenate([first[None], rest]).swapaxes(0, 1)

    return run(params, batch["source"], batch["source_mask"], jnp.asarray(tokens), mixture)


@pytest.fixture(scope="module")
def small():
    return make_model(CONFIG, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_match_transformers(kind, tmp_path):
    reference = make_reference(kind, seed=1)
    reference.save_pretrained(tmp_path)
    model = Llama(llama_config_from_hf(read_model_config(tmp_path)), jnp.float32, "none")
    params = load_pretrained(tmp_path, abstract_params(model))
    batch = make_batch(seed=2)
    real = batch["target_mask"]
    want = reference_logits(reference, batch)[real]
    assert want.std() > 0.5
    np.testing.assert_allclose(np.asarray(logits_of(model, params, batch))[real], want, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi-head, untied", "llama3"])
def test_greedy_tokens_match_transformers(kind, tmp_path):
    reference = make_reference(kind, seed=3)
    reference.save_pretrained(tmp_path)
    model = Llama(llama_config_from_hf(read_model_config(tmp_path)), jnp.float32, "none")
    params = load_pretrained(tmp_path, abstract_params(model))
    batch = make_batch(seed=4, rows=4)

    @jax.jit
    def generate(params, source, source_mask):
        apply = functools.partial(model.apply, {"params": params})
        logits, cache = apply(source, source_mask, 20, method="prefill")
        done = jnp.zeros(source.shape[0], bool)
        step = functools.partial(apply, method="decode_step")
        return extend_until_end(step, most_likely, logits, cache, done, 20, eos_id=-1, pad_id=0)

    got = generate(params, batch["source"], batch["source_mask"])
    want = reference_tokens(reference, batch, 20)
    assert len(np.unique(want)) > 3
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_left_padding_changes_nothing(small):
    model, params = small
    batch, mixture = make_batch(seed=5), make_mixture(CONFIG, seed=6)
    wide = {
        **batch,
        "source": np.pad(batch["source"], ((0, 0), (5, 0)), constant_values=7),
        "source_mask": np.pad(batch["source_mask"], ((0, 0), (5, 0))),
    }
    np.testing.assert_allclose(
        logits_of(model, params, wide, mixture), logits_of(model, params, batch, mixture), atol=2e-5, rtol=0
    )


@pytest.mark.slow
def test_a_row_depends_on_no_other_row_nor_on_later_tokens(small):
    model, params = small
    batch = make_batch(seed=7)
    changed = {name: array.copy() for name, array in batch.items()}
    changed["source"][1:] = (changed["source"][1:] + 3) % VOCAB
    changed["target"][0, 4:] = (changed["target"][0, 4:] + 3) % VOCAB
    got, before = logits_of(model, params, changed), logits_of(model, params, batch)
    np.testing.assert_array_equal(got[0, :5], before[0, :5])
    assert np.abs(got - before)[0, 5:].max() > 1e-2 and np.abs(got - before)[1:].max() > 1e-2


@pytest.mark.slow
def test_decoding_equals_teacher_forcing(small):
    model, params = small
    batch, mixture = make_batch(seed=8), make_mixture(CONFIG, seed=9)
    batch["target_mask"][:] = True
    got = decode(model, params, batch, batch["target"][:, :-1], mixture)
    np.testing.assert_allclose(got, logits_of(model, params, batch, mixture), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_remat_changes_no_gradient(small):
    batch, mixture = make_batch(seed=10), make_mixture(CONFIG, seed=11)

    def gradient(remat):
        def loss(blocks):
            model = Llama(CONFIG, jnp.float32, remat)
            logits = model.apply({"params": small[1]}, **batch, pet=mixture.replace(blocks=blocks))
            return token_cross_entropy(logits, batch["target"], batch["target_mask"])[0]

        return jax.jit(jax.grad(loss))(mixture.blocks)

    plain = gradient("none")
    assert all((np.abs(leaf) > 0).all() for leaf in jax.tree.leaves(plain))
    for remat in ("full", "dots"):
        again = gradient(remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), again, plain)


def test_unknown_remat_is_an_error():
    with pytest.raises(ValueError, match="config.model.remat='all' is unknown; choose 'none', 'full' or 'dots'"):
        abstract_params(Llama(CONFIG, jnp.float32, "all"))


def test_no_mixture_equals_a_mixture_with_zero_b(small):
    model, params = small
    batch, mixture = make_batch(seed=12), make_mixture(CONFIG, seed=13)

    def clear(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key == "b" else leaf

    empty = mixture.replace(blocks=jax.tree_util.tree_map_with_path(clear, mixture.blocks))
    plain = logits_of(model, params, batch)
    np.testing.assert_array_equal(logits_of(model, params, batch, empty), plain)
    assert np.abs(logits_of(model, params, batch, mixture) - plain).max() > 0.1


def test_mixture_equals_merged_kernels(small):
    """With the same weights for all rows, adding sum_t w_t s A_t B_t to the kernels of q and v gives the same model."""
    model, params = small
    batch, bank, weights = make_batch(seed=14), make_bank(CONFIG, seed=15), np.array([0.5, 0.2, 0.3])
    merged = jax.tree.map(np.asarray, params)
    for projection, block in bank["decoder"]["layers"]["self_attention"].items():
        a, b = (np.asarray(block[name], np.float64) for name in ("a", "b"))
        delta = sum(w * (4.0 / 2) * a[:, :, t] @ b[:, t] for t, w in enumerate(weights))
        kernel = merged["decoder"]["layers"]["self_attention"][projection]["kernel"]
        merged["decoder"]["layers"]["self_attention"][projection]["kernel"] = (kernel + delta).astype(np.float32)
    mixture = LORA.mix(bank, jnp.tile(jnp.asarray(weights, jnp.float32), (3, 1)), 0)
    want = logits_of(model, merged, batch)
    assert np.abs(want - logits_of(model, params, batch)).max() > 0.1
    np.testing.assert_allclose(logits_of(model, params, batch, mixture), want, atol=5e-5, rtol=0)


def test_a_filler_row_is_finite(small):
    model, params = small
    batch = make_batch(seed=16)
    batch["source_mask"][2], batch["target_mask"][2] = False, False
    assert np.isfinite(logits_of(model, params, batch)).all()


@pytest.mark.slow
def test_bfloat16_stays_near_float32(small):
    model, params = small
    rough = Llama(CONFIG, jnp.bfloat16, "none")
    batch, mixture = make_batch(seed=17), make_mixture(CONFIG, seed=18)
    want, got = logits_of(model, params, batch, mixture), logits_of(rough, params, batch, mixture)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - want).mean() / jnp.abs(want).mean()) < 0.03


def test_config_reader_gives_the_shape():
    assert llama_config_from_hf(GOOD) == CONFIG
    plain = {name: value for name, value in GOOD.items() if name not in ("num_key_value_heads", "head_dim")}
    config = llama_config_from_hf({**plain, "tie_word_embeddings": True, "hidden_act": "gelu"})
    assert config == dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=4, tie_embeddings=True, activation="gelu")


def test_config_reader_takes_both_forms_of_rope_scaling():
    """transformers 5 writes `rope_parameters`, theta inside; before it wrote `rope_scaling` and, older yet, "type"."""
    scaling = {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = {**GOOD, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {name: value for name, value in GOOD.items() if name != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 100.0, **scaling}
    assert llama_config_from_hf(old) == llama_config_from_hf(new)
    assert dict(llama_config_from_hf(old).rope_scaling) == {"rope_type": "llama3", **scaling}
    oldest = {**GOOD, "rope_scaling": {"type": "linear", "factor": 2.0}}
    named = {**GOOD, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert llama_config_from_hf(oldest) == llama_config_from_hf(named)
    assert llama_config_from_hf({**GOOD, "rope_scaling": None}) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', this is the loader for 'llama'"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope scaling 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' lacks factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "rope scaling 'llama3' lacks high_freq_factor, low_freq_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "truncate": False}},
            "rope scaling 'yarn' with mscale, truncate is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope scaling 'default' with partial_rotary_factor is not supported",
        ),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported are silu, gelu"),
        (
            {"hidden_size": None, "vocab_size": None},
            "missing vocab_size, hidden_size. Take the config.json",
        ),
    ],
)
def test_config_errors_name_the_file_and_the_field(changes, message):
    config = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(ValueError) as error:
        llama_config_from_hf(config, "there/config.json")
    assert str(error.value).startswith("there/config.json: ") and message in str(error.value)


@pytest.mark.slow
def test_every_activation_is_transformers_own():
    from transformers.activations import ACT2FN

    torch = pytest.importorskip("torch", reason="the reference is PyTorch's")
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    for name, activation in ACTIVATIONS.items():
        assert llama_config_from_hf({**GOOD, "hidden_act": name}).activation == name
        np.testing.assert_allclose(activation(jnp.asarray(x)), ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("smollm2-135m", 134.52), ("llama-2-7b", 6738.42), ("llama-2-13b", 13015.86), ("llama-3-8b", 8030.26),
        ("llama-3.1-8b", 8030.26), ("llama-3.2-1b", 1235.81), ("llama-3.2-3b", 3212.75),
    ],
)  # fmt: skip
def test_variant_has_the_published_size(name, millions):
    params = abstract_params(Llama(LLAMA_VARIANTS[name], jnp.bfloat16, "none"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(millions * 1e6, abs=6e3)


def test_a_config_of_another_model_is_no_llama(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2"):
        llama_config_from_hf(read_model_config(tmp_path), str(tmp_path))
