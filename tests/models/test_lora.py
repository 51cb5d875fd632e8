"""LoRA on any kernel of the layers, in both families: the mixture equals a model with merged kernels, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sapt_jax.models.families import make_model, parameters
from sapt_jax.models.shapes import LlamaConfig, T5Config
from sapt_jax.pet import Mixture
from tests.helpers import llama_reference, t5_reference

VOCAB = 31
GATED = T5Config(VOCAB, 16, 2, 3, 3, 4, 20, "gelu_new", True, 1e-6, 8, 12, False)
PLAIN = T5Config(VOCAB, 16, 2, 3, 3, 4, 20, "relu", False, 1e-6, 8, 12, True)
GROUPED = LlamaConfig(VOCAB, 16, 3, 4, 2, 6, 20, 1e-5, 100.0, (), 64, False)
ATTENTIONS = ["query", "key", "value", "out"]
SHAPES = {
    "gated T5": (GATED, t5_reference.make_batch, {*ATTENTIONS, "wi_0", "wi_1", "wo"}),
    "T5": (PLAIN, t5_reference.make_batch, {*ATTENTIONS, "wi", "wo"}),
    "LLaMA": (GROUPED, llama_reference.make_batch, {*ATTENTIONS, "wi_0", "wi_1", "wo"}),
}
ROWS, TASKS, RANK, SCALE = 3, 3, 2, 1.5
MODELS = pytest.mark.parametrize("name", SHAPES)


def layer_modules(model):
    """Paths of all modules in the layers that hold a kernel."""
    paths = [path.removesuffix("/kernel") for path in parameters(model) if path.endswith("/kernel")]
    return [path for path in paths if "/layers/" in path]


def make_params(model, seed):
    """Random parameters by path, norms and position biases included."""
    rng, params = np.random.default_rng(seed), {}
    for path, parameter in parameters(model).items():
        draw = rng.standard_normal(parameter.shape)
        if path.endswith("scale"):
            draw = 1 + 0.2 * draw
        elif path.endswith("kernel"):
            draw *= (0.5 if path.endswith(("query/kernel", "key/kernel")) else 1) * parameter.shape[-2] ** -0.5
        params[path] = draw.astype(np.float32)
    return params


def make_bank(model, modules, seed):
    """{module's path: (A [layers, D, T, R], B [layers, T, R, H])}, so that A B is about a third of a kernel."""
    rng, bank = np.random.default_rng(seed), {}
    for path in modules:
        layers, fan_in, fan_out = parameters(model)[f"{path}/kernel"].shape
        a = rng.standard_normal((layers, fan_in, TASKS, RANK)) * fan_in**-0.5
        bank[path] = a, 0.3 * rng.standard_normal((layers, TASKS, RANK, fan_out))
    return bank


def mixture_of(bank, weights):
    blocks = {}
    for path, (a, b) in bank.items():
        blocks[f"{path}/a"] = a.reshape(*a.shape[:2], -1).astype(np.float32)
        blocks[f"{path}/b"] = b.reshape(b.shape[0], -1, b.shape[-1]).astype(np.float32)
    columns = SCALE * np.repeat(weights, RANK, axis=1)
    return Mixture(unflatten_dict(blocks, sep="/"), jnp.asarray(columns, jnp.float32))


def merged(params, bank, weights):
    """The kernels W + sum_t weights[t] * SCALE * A_t B_t."""
    params = dict(params)
    for path, (a, b) in bank.items():
        delta = sum(weight * SCALE * a[:, :, t] @ b[:, t] for t, weight in enumerate(weights))
        params[f"{path}/kernel"] = (params[f"{path}/kernel"] + delta).astype(np.float32)
    return params


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch, mixture=None):
    return model.apply({"params": unflatten_dict(params, sep="/")}, **batch, pet=mixture)


@functools.partial(jax.jit, static_argnums=0)
def decoded(model, params, batch, mixture):
    """Logits [B, L, V] of prefill, then of decode_step fed with the target."""
    apply = functools.partial(model.apply, {"params": unflatten_dict(params, sep="/")})
    target = batch["target"]
    first, cache = apply(batch["source"], batch["source_mask"], target.shape[1], mixture, method="prefill")

    def step(cache, token):
        logits, cache = apply(token, cache, mixture, method="decode_step")
        return cache, logits

    _, rest = jax.lax.scan(step, cache, target[:, :-1].T)
    return jnp.concatenate([first[None], rest]).swapaxes(0, 1)


def check_against_merged_kernels(name, chosen, seed):
    """Compares logits where the modules that `chosen` takes have random blocks, teacher-forced and decoded."""
    shape, make_batch, _ = SHAPES[name]
    model = make_model(shape, "float32", "none")
    params, batch = make_params(model, seed), make_batch(seed + 1, rows=ROWS, vocab=VOCAB)
    batch["target_mask"][:] = True
    bank = make_bank(model, filter(chosen, layer_modules(model)), seed + 2)
    assert bank
    weights = np.random.default_rng(seed + 3).dirichlet(np.ones(TASKS), ROWS)
    want = np.stack([logits_of(model, merged(params, bank, weights[row]), batch)[row] for row in range(ROWS)])
    assert np.abs(want - logits_of(model, params, batch)).max(axis=(1, 2)).min() > 0.1
    mixture = mixture_of(bank, weights)
    np.testing.assert_allclose(logits_of(model, params, batch, mixture), want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(decoded(model, params, batch, mixture), want, atol=1e-4, rtol=0)


@pytest.mark.slow
@MODELS
def test_blocks_on_every_kernel_equal_merged_kernels(name):
    shape, _, kernels = SHAPES[name]
    modules = layer_modules(make_model(shape, "float32", "none"))
    assert {path.rsplit("/", 1)[1] for path in modules} == kernels
    check_against_merged_kernels(name, lambda path: True, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stack"), [("gated T5", "encoder"), ("T5", "decoder"), ("LLaMA", "decoder")])
def test_blocks_on_one_stack_and_projection_equal_merged_kernels(name, stack):
    check_against_merged_kernels(name, lambda path: path.startswith(stack) and path.endswith("/out"), seed=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated T5", "LLaMA"])
def test_a_gradient_reaches_every_block_under_remat(name):
    shape, make_batch, _ = SHAPES[name]
    model = make_model(shape, "float32", "dots")
    params, batch = make_params(model, seed=30), make_batch(31, rows=ROWS, vocab=VOCAB)
    weights = np.random.default_rng(32).dirichlet(np.ones(TASKS), ROWS)
    mixture = mixture_of(make_bank(model, layer_modules(model), seed=33), weights)

    def loss(blocks):
        return jnp.sum(jnp.sin(logits_of(model, params, batch, mixture.replace(blocks=blocks))))

    for path, gradient in flatten_dict(jax.grad(loss)(mixture.blocks), sep="/").items():
        assert (np.abs(gradient).max(axis=(1, 2)) > 0).all(), path


@pytest.mark.slow
@MODELS
def test_only_projections_with_blocks_have_products_more(name):
    """Two products for the one block of the decoder's layers, which are one loop; none for a mixture without blocks."""
    shape, make_batch, _ = SHAPES[name]
    model = make_model(shape, "float32", "none")
    params, batch = make_params(model, seed=40), make_batch(41, rows=ROWS, vocab=VOCAB)
    bank = make_bank(model, ["decoder/layers/self_attention/out"], seed=42)

    def products(mixture):
        return logits_of.lower(model, params, batch, mixture).as_text().count("stablehlo.dot_general")

    columns = np.ones((ROWS, TASKS))
    assert products(mixture_of({}, columns)) == products(None)
    assert products(mixture_of(bank, columns)) == products(None) + 2
