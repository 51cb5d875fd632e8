"""Small PyTorch LLaMA models for parity tests, one of each kind of attention, head and position scaling."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

VOCAB = 31
_LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

# name -> overrides of transformers' config. The inner width num_heads * head_dim differs from hidden_size in three.
KINDS = {
    "multi-head, untied": {"num_key_value_heads": 4},
    "grouped, tied": {"tie_word_embeddings": True},
    "linear": {"head_dim": 6, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "llama3": {
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", **_LLAMA3},
    },
    "yarn": {"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "beta_fast": 1.5, "beta_slow": 0.5, **_YARN}},
    "yarn, factor": {"rope_parameters": {"rope_type": "yarn", "attention_factor": 1.3, **_YARN}},
}


def make_reference(kind, seed):
    """A random PyTorch model in evaluation mode, its weights large enough that every part moves the logits."""
    overrides = dict(KINDS[kind])
    rope = {"rope_theta": 50.0, "rope_type": "default", **overrides.pop("rope_parameters", {})}
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        **overrides,
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(torch.randn_like(weight) / weight.shape[1] ** 0.25)
            else:
                weight.copy_(torch.randn_like(weight) / weight.shape[1] ** 0.5)
    return model


def make_batch(seed, rows=3, source_length=17, target_length=7, vocab=VOCAB):
    """Left-padded source and right-padded target; the first row of each is full."""
    rng = np.random.default_rng(seed)

    def ids(length, backwards):
        lengths = np.concatenate([[length], rng.integers(2, length, rows - 1)])
        mask = np.arange(length) < lengths[:, None]
        mask = mask[:, ::-1] if backwards else mask
        return np.where(mask, rng.integers(2, vocab, (rows, length)), 0).astype(np.int32), np.ascontiguousarray(mask)

    (source, source_mask), (target, target_mask) = ids(source_length, True), ids(target_length, False)
    return {"source": source, "source_mask": source_mask, "target": target, "target_mask": target_mask}


def reference_logits(model, batch):
    """transformers' logits [B, L, V] that predict each target token."""
    ids = torch.tensor(np.concatenate([batch["source"], batch["target"]], axis=1)).long()
    mask = torch.tensor(np.concatenate([batch["source_mask"], batch["target_mask"]], axis=1)).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    return logits[:, batch["source"].shape[1] - 1 : -1]


def reference_tokens(model, batch, steps):
    """What transformers generates greedily after the source, [B, steps], ends of text ignored."""
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor(batch["source"]).long(),
            attention_mask=torch.tensor(batch["source_mask"]).long(),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()
    return ids[:, batch["source"].shape[1] :]
