"""T5 against PyTorch transformers in every generation, and its own invariants: padding, caching, LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from sapt_jax import pet
from sapt_jax.methods.losses import token_cross_entropy
from sapt_jax.models.relative_bias import relative_buckets
from sapt_jax.models.shapes import T5_VARIANTS, T5Config, t5_config_from_hf
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from tests.helpers.t5_reference import GENERATIONS, VOCAB, make_batch, make_reference, reference_logits, save, torch
from tests.helpers.trees import random_bank

CONFIG = T5Config(
    vocab_size=31,
    d_model=16,
    num_encoder_layers=2,
    num_decoder_layers=3,
    num_heads=3,
    head_dim=4,
    d_ff=20,
    activation="gelu_new",
    gated=True,
    norm_eps=1e-6,
    relative_buckets=8,
    relative_max_distance=12,
    tie_embeddings=False,
)
SHAPES = {
    "v1.1": CONFIG,
    "v1.0": dataclasses.replace(CONFIG, gated=False, activation="relu", tie_embeddings=True),
    "bias per layer": dataclasses.replace(CONFIG, bias_per_layer=True),
}


def fast_is(fast, names):
    """All names as parameters, of which the fast tests take one."""
    return [pytest.param(name, marks=() if name == fast else pytest.mark.slow) for name in names]


def abstract_params(model):
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])


def make_model(config, seed, dtype=jnp.float32, remat="none"):
    """A model and random parameters, norms and position biases included."""
    model = T5(config, dtype, remat)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.asarray(1 + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)
        fan_in = 1 if "embedding" in name else leaf.shape[-2]
        gain = 0.5 if "query" in name or "key" in name else 1.0
        return jnp.asarray(gain * rng.standard_normal(leaf.shape) / fan_in**0.5, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def make_mixture(config, seed, rows, tasks=3, rank=2, weights=None):
    rng = np.random.default_rng(seed)
    bank = random_bank(pet.Lora(rank, 4.0), T5(config, jnp.float32, "none"), tasks, seed + 50)
    weights = rng.dirichlet(np.ones(tasks), rows) if weights is None else weights
    return bank, weights, pet.Lora(rank, 4.0).mix(bank, jnp.asarray(weights, jnp.float32), 0)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch, mixture=None):
    return model.apply({"params": params}, **batch, pet=mixture)


def greedy(model, params, batch, steps, mixture=None):
    """Greedy tokens [B, steps] and their logits [B, steps, V] through prefill and decode_step."""

    @jax.jit
    def decode(variables, source, source_mask):
        def step(state, _):
            logits, cache = state
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return model.apply(variables, token, cache, mixture, method="decode_step"), (token, logits)

        start = model.apply(variables, source, source_mask, steps, mixture, method="prefill")
        return jax.lax.scan(step, start, length=steps)[1]

    tokens, logits = decode({"params": params}, batch["source"], batch["source_mask"])
    return np.swapaxes(tokens, 0, 1), np.swapaxes(logits, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("generation", fast_is("v1.1", GENERATIONS))
def test_matches_transformers(generation, tmp_path):
    reference = make_reference(generation, seed=1)
    path = save(reference, tmp_path)
    config = t5_config_from_hf(read_model_config(path))
    model = T5(config, jnp.float32, "none")
    params = load_pretrained(path, abstract_params(model))
    batch = make_batch(seed=2)
    want, want_loss = reference_logits(reference, batch)

    got = logits_of(model, params, batch)
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    nll, tokens = token_cross_entropy(got, batch["target"], batch["target_mask"])
    assert abs(float(nll / tokens) - want_loss) < 1e-5

    tokens, _ = greedy(model, params, batch, steps=20)
    with torch.no_grad():
        generated = reference.generate(
            input_ids=torch.tensor(batch["source"], dtype=torch.long),
            attention_mask=torch.tensor(batch["source_mask"]).long(),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            use_cache=False,
        ).numpy()
    np.testing.assert_array_equal(tokens, generated[:, 1:])


@pytest.mark.slow
def test_buckets_match_transformers():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-400, 401)
    for buckets, max_distance in ((32, 128), (8, 20), (4, 128), (32, 256)):
        for bidirectional in (True, False):
            want = T5Attention._relative_position_bucket(torch.tensor(distance), bidirectional, buckets, max_distance)
            got = relative_buckets(jnp.asarray(distance), bidirectional, buckets, max_distance)
            np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("shape", fast_is("v1.1", SHAPES))
def test_padding_changes_nothing(shape):
    model, params = make_model(SHAPES[shape], seed=3)
    batch = make_batch(seed=4, vocab=31)
    wide = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in batch.items()}
    wide["source"] = np.where(wide["source_mask"], wide["source"], 7)
    plain, padded = logits_of(model, params, batch), logits_of(model, params, wide)[:, :7]
    real = batch["target_mask"]
    np.testing.assert_allclose(np.asarray(padded)[real], np.asarray(plain)[real], atol=2e-5)


@pytest.mark.slow
def test_rows_do_not_see_each_other():
    model, params = make_model(CONFIG, seed=5)
    batch = make_batch(seed=6, vocab=31)
    alone = {name: array[1:2] for name, array in batch.items()}
    np.testing.assert_allclose(logits_of(model, params, alone)[0], logits_of(model, params, batch)[1], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", fast_is("v1.1", SHAPES))
def test_decoding_equals_teacher_forcing(shape):
    config = SHAPES[shape]
    model, params = make_model(config, seed=7)
    batch = make_batch(seed=8, vocab=31)
    _, _, mixture = make_mixture(config, seed=9, rows=3)
    tokens, stepwise = greedy(model, params, batch, steps=15, mixture=mixture)
    forced = {**batch, "target": tokens, "target_mask": np.ones_like(tokens, bool)}
    np.testing.assert_allclose(logits_of(model, params, forced, mixture), stepwise, atol=2e-5)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    batch = make_batch(seed=10, vocab=31)
    _, params = make_model(CONFIG, seed=11)
    _, _, mixture = make_mixture(CONFIG, seed=12, rows=3)

    def gradient(remat):
        def loss(blocks):
            model = T5(CONFIG, jnp.float32, remat)
            logits = logits_of(model, params, batch, mixture.replace(blocks=blocks))
            return token_cross_entropy(logits, batch["target"], batch["target_mask"])[0]

        return jax.jit(jax.grad(loss))(mixture.blocks)

    plain = gradient("none")
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(plain))
    for remat in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradient(remat), plain)


@pytest.mark.slow
def test_no_mixture_equals_zero_mixture():
    model, params = make_model(CONFIG, seed=13)
    batch = make_batch(seed=14, vocab=31)
    _, _, mixture = make_mixture(CONFIG, seed=15, rows=3, weights=np.zeros((3, 3)))
    np.testing.assert_array_equal(logits_of(model, params, batch), logits_of(model, params, batch, mixture))


@pytest.mark.slow
@pytest.mark.parametrize("shape", fast_is("v1.1", SHAPES))
def test_mixture_equals_written_out_blocks(shape):
    """Each task's block applied by itself, weighted and summed, in a float64 model written out layer by layer."""
    config = SHAPES[shape]
    model, params = make_model(config, seed=16)
    batch = make_batch(seed=17, vocab=31)
    bank, weights, mixture = make_mixture(config, seed=18, rows=3)
    want = WrittenOut(config, params, bank, weights, scale=4.0 / 2).logits(batch)
    got = logits_of(model, params, batch, mixture)
    assert np.abs(want - logits_of(model, params, batch)).max() > 0.1
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


class WrittenOut:
    """T5 with a mixture of LoRA blocks in float64 numpy, one loop for each sum."""

    def __init__(self, config, params, bank, weights, scale):
        def as_float64(tree):
            return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)

        self.config, self.params, self.bank = config, as_float64(params), as_float64(bank)
        self.weights, self.scale = weights, scale

    def norm(self, x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config.norm_eps) * scale

    def project(self, x, kernel, blocks, layer):
        y = x @ kernel[layer]
        if blocks is not None:
            for task in range(self.weights.shape[1]):
                delta = x @ blocks["a"][layer, :, task] @ blocks["b"][layer, task]
                y = y + self.weights[:, task, None, None] * self.scale * delta
        return y

    def attend(self, x, memory, kernels, blocks, layer, bias, mask):
        """bias [N, L, S], mask [B, L, S]."""
        c = self.config
        query = self.project(x, kernels["query"]["kernel"], blocks["query"], layer)
        key = self.project(memory, kernels["key"]["kernel"], None, layer)
        value = self.project(memory, kernels["value"]["kernel"], blocks["value"], layer)
        heads = []
        for head in range(c.num_heads):
            part = slice(head * c.head_dim, (head + 1) * c.head_dim)
            scores = np.einsum("blh,bsh->bls", query[..., part], key[..., part]) + bias[head]
            scores = np.where(mask, scores, -np.inf)
            probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probabilities /= probabilities.sum(axis=-1, keepdims=True)
            heads.append(np.einsum("bls,bsh->blh", probabilities, value[..., part]))
        return np.concatenate(heads, axis=-1) @ kernels["out"]["kernel"][layer]

    def feed_forward(self, x, mlp, layer):
        if not self.config.gated:
            return np.maximum(x @ mlp["wi"]["kernel"][layer], 0) @ mlp["wo"]["kernel"][layer]
        gate = x @ mlp["wi_0"]["kernel"][layer]
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return gate * (x @ mlp["wi_1"]["kernel"][layer]) @ mlp["wo"]["kernel"][layer]

    def bias(self, stack, layer, length, bidirectional):
        c, table = self.config, self.params[stack]["relpos_bias"]["rel_embedding"]
        table = table[layer] if c.bias_per_layer else table
        distance = np.arange(length)[None, :] - np.arange(length)[:, None]
        buckets = relative_buckets(jnp.asarray(distance), bidirectional, c.relative_buckets, c.relative_max_distance)
        return table[:, np.asarray(buckets)]

    def logits(self, batch):
        c, table = self.config, self.params["token_embedder"]["embedding"]
        encoder, decoder = self.params["encoder"], self.params["decoder"]
        x, valid = table[batch["source"]], batch["source_mask"][:, None, :]
        layers, length = encoder["layers"], x.shape[1]
        for layer in range(c.num_encoder_layers):
            h = self.norm(x, layers["pre_attention_layer_norm"]["scale"][layer])
            blocks, bias = self.bank["encoder"]["layers"]["attention"], self.bias("encoder", layer, length, True)
            x = x + self.attend(h, h, layers["attention"], blocks, layer, bias, valid)
            h = self.norm(x, layers["pre_mlp_layer_norm"]["scale"][layer])
            x = x + self.feed_forward(h, layers["mlp"], layer)
        encoded = self.norm(x, encoder["encoder_norm"]["scale"])

        shifted = np.concatenate([np.zeros_like(batch["target"][:, :1]), batch["target"][:, :-1]], axis=1)
        x, layers, length = table[shifted], decoder["layers"], shifted.shape[1]
        causal = np.tril(np.ones((length, length), bool))[None]
        for layer in range(c.num_decoder_layers):
            h = self.norm(x, layers["pre_self_attention_layer_norm"]["scale"][layer])
            blocks, bias = self.bank["decoder"]["layers"]["self_attention"], self.bias("decoder", layer, length, False)
            x = x + self.attend(h, h, layers["self_attention"], blocks, layer, bias, causal)
            h = self.norm(x, layers["pre_cross_attention_layer_norm"]["scale"][layer])
            blocks, none = self.bank["decoder"]["layers"]["encoder_decoder_attention"], np.zeros(c.num_heads)
            x = x + self.attend(h, encoded, layers["encoder_decoder_attention"], blocks, layer, none, valid)
            h = self.norm(x, layers["pre_mlp_layer_norm"]["scale"][layer])
            x = x + self.feed_forward(h, layers["mlp"], layer)
        x = self.norm(x, decoder["decoder_norm"]["scale"])
        return x @ table.T * c.d_model**-0.5 if c.tie_embeddings else x @ decoder["logits_dense"]["kernel"]


def test_fully_masked_row_is_finite():
    model, params = make_model(CONFIG, seed=19)
    batch = make_batch(seed=20, vocab=31)
    batch["source_mask"][2], batch["target_mask"][2] = False, False
    assert np.isfinite(logits_of(model, params, batch)).all()


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    batch = make_batch(seed=21, vocab=31)
    (exact, params), (rough, _) = make_model(CONFIG, seed=22), make_model(CONFIG, seed=22, dtype=jnp.bfloat16)
    want, got = logits_of(exact, params, batch), logits_of(rough, params, batch)
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - want).mean() / jnp.abs(want).mean()) < 0.03


@pytest.mark.slow
def test_gradient_reaches_every_block_through_both_stacks():
    model, params = make_model(CONFIG, seed=23)
    batch = make_batch(seed=24, vocab=31)
    bank, weights, _ = make_mixture(CONFIG, seed=25, rows=3)

    def loss(weights):
        mixture = pet.Lora(2, 4.0).mix(bank, weights, 0)
        logits = logits_of(model, params, batch, mixture)
        return token_cross_entropy(logits, batch["target"], batch["target_mask"])[0]

    assert (np.abs(jax.jit(jax.grad(loss))(jnp.asarray(weights, jnp.float32))) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    (
        ("t5-small", 60.5), ("t5-base", 222.9), ("t5-large", 737.7), ("t5-3b", 2851.6), ("t5-11b", 11307.3),
        ("t5-v1_1-small", 77.0), ("t5-v1_1-base", 247.6), ("t5-v1_1-large", 783.2), ("t5-v1_1-xl", 2849.8),
        ("t5-v1_1-xxl", 11135.3),
    ),
)  # fmt: skip
def test_variant_has_the_published_size(name, millions):
    params = abstract_params(T5(T5_VARIANTS[name], jnp.bfloat16, "none"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(millions * 1e6, abs=6e4)


def test_config_errors_name_the_file_and_the_field():
    good = {
        "model_type": "t5", "vocab_size": VOCAB, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8,
        "layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 8,
    }  # fmt: skip
    assert t5_config_from_hf(good).num_decoder_layers == 1
    with pytest.raises(ValueError, match=r"there/config.json: missing d_kv"):
        t5_config_from_hf({k: v for k, v in good.items() if k != "d_kv"}, "there/config.json")
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        t5_config_from_hf({**good, "model_type": "bert"})
    with pytest.raises(ValueError, match="decoder_start_token_id is 5"):
        t5_config_from_hf({**good, "decoder_start_token_id": 5})
