"""Small PyTorch T5 models for parity tests, one of each generation."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

# name -> overrides of transformers' config; mT5 is v1.1. The inner width num_heads * d_kv differs from d_model.
GENERATIONS = {
    "v1.0": {"feed_forward_proj": "relu", "num_heads": 2, "d_kv": 6},
    "v1.1": {"feed_forward_proj": "gated-gelu", "num_heads": 4, "d_kv": 8, "tie_word_embeddings": False},
    "umt5": {"feed_forward_proj": "gated-gelu", "num_heads": 3, "d_kv": 4, "tie_word_embeddings": False},
}
VOCAB, D_MODEL = 29, 16


def make_reference(generation, seed, **overrides):
    """A random PyTorch model in evaluation mode, with an untied head where its generation has one.

    Weights are drawn large enough that every part moves the logits: transformers' init leaves some near zero.
    """
    family = "UMT5" if generation == "umt5" else "T5"
    settings = {
        "vocab_size": VOCAB,
        "d_model": D_MODEL,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
        **GENERATIONS[generation],
        **overrides,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    if not settings.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(settings["vocab_size"], settings["d_model"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif "relative_attention_bias" in name:
                weight.copy_(torch.randn_like(weight))
            elif "shared" not in name and "lm_head" not in name:
                gain = 0.3 if name.endswith((".q.weight", ".k.weight")) else 1.0
                weight.copy_(gain * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    return model


def make_batch(seed, rows=3, source_length=11, target_length=7, vocab=VOCAB):
    """Right-padded source and target; the first row of each is full."""
    rng = np.random.default_rng(seed)

    def ids(length):
        lengths = np.concatenate([[length], rng.integers(2, length, rows - 1)])
        mask = np.arange(length) < lengths[:, None]
        return np.where(mask, rng.integers(2, vocab, (rows, length)), 0).astype(np.int32), mask

    (source, source_mask), (target, target_mask) = ids(source_length), ids(target_length)
    return {"source": source, "source_mask": source_mask, "target": target, "target_mask": target_mask}


def reference_logits(model, batch):
    """transformers' logits [B, L, V] and mean loss over the target's tokens."""
    labels = torch.tensor(np.where(batch["target_mask"], batch["target"], -100), dtype=torch.long)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(batch["source"], dtype=torch.long),
            attention_mask=torch.tensor(batch["source_mask"]).long(),
            labels=labels,
        )
    return output.logits.numpy(), float(output.loss)


def save(model, folder):
    """Saves a model as transformers does, weights in safetensors."""
    model.save_pretrained(folder)
    return folder
