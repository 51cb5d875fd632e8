"""Rule tables of the T5 family: Hugging Face's names and T5X's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sapt_jax.pretrained.rules import Rule, Source, Table

MODEL_TYPES = ("t5", "mt5", "umt5")

_TRANSPOSE = (1, 0)
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_HEAD, _EMBEDDING = "lm_head.weight", "shared.weight"
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_COMPARED_ROWS = 1024
# In the order of a layer: our attention or MLP, the norm before it, and the attention's name in transformers.
_STACKS = {
    "encoder": (
        ("attention", "pre_attention_layer_norm", "SelfAttention"),
        ("mlp", "pre_mlp_layer_norm", ""),
    ),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ("mlp", "pre_mlp_layer_norm", ""),
    ),
}


def hf_table(config: Mapping[str, Any]) -> Table:
    """Returns the table for transformers' T5ForConditionalGeneration, MT5... and UMT5...

    Args:
      config: the contents of config.json, as `settle_tie` returns it.
    """
    tied = (_HEAD,) if config["tie_word_embeddings"] else ()
    rules = [Rule("token_embedder/embedding", _EMBEDDING, other_names=(*_EMBEDDING_COPIES, *tied))]
    for stack, sublayers in _STACKS.items():
        rules += _hf_stack(stack, sublayers, per_layer=config["model_type"] == "umt5")
    rules.append(Rule("decoder/logits_dense/kernel", _HEAD, _TRANSPOSE))
    ignore = [
        r"(encoder|decoder)\.embed_tokens\.weight",
        # Old exports hold a table that no attention reads.
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ]
    if config["tie_word_embeddings"]:
        ignore.append(r"lm_head\.weight")
    return Table(tuple(rules), tuple(ignore))


def _hf_stack(stack: str, sublayers: tuple[tuple[str, str, str], ...], per_layer: bool) -> list[Rule]:
    ours, block = f"{stack}/layers", f"{stack}.block.{{layer}}.layer"
    first = "{layer}" if per_layer else "0"
    rules = [
        Rule(f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight"),
        Rule(
            f"{stack}/relpos_bias/rel_embedding",
            f"{stack}.block.{first}.layer.0.SelfAttention.relative_attention_bias.weight",
            _TRANSPOSE,
        ),
    ]
    for place, (module, norm, name) in enumerate(sublayers):
        rules.append(Rule(f"{ours}/{norm}/scale", f"{block}.{place}.layer_norm.weight"))
        if module == "mlp":
            rules += [
                Rule(
                    f"{ours}/mlp/{kernel}/kernel",
                    f"{block}.{place}.DenseReluDense.{kernel}.weight",
                    _TRANSPOSE,
                )
                for kernel in ("wi", "wi_0", "wi_1", "wo")
            ]
        else:
            rules += [
                Rule(f"{ours}/{module}/{kernel}/kernel", f"{block}.{place}.{name}.{letter}.weight", _TRANSPOSE)
                for kernel, letter in _PROJECTIONS.items()
            ]
    return rules


def settle_tie(config: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Returns config.json with `tie_word_embeddings` as the weights have it, and whether outputs are scaled.

    Transformers 5 writes true for every T5. The head is tied where there is none, or where it is a copy of
    the embedding.

    Args:
      config: the contents of config.json.
      source: the folder's weights.
    """
    shapes = source.shapes()
    table = next((name for name in (_EMBEDDING, *_EMBEDDING_COPIES) if name in shapes), None)
    said = config.get("tie_word_embeddings") is not False
    tied = _HEAD not in shapes or (table is None and said)
    if not tied and table and shapes[_HEAD] == shapes[table]:
        rows = (slice(0, min(_COMPARED_ROWS, shapes[_HEAD][0])), slice(None))
        tied = np.array_equal(source.read(_HEAD, rows), source.read(table, rows))
    # Transformers 4 says with the tie whether outputs are scaled, transformers 5 beside it; mT5's never are.
    scaled = config.get("scale_decoder_outputs", said and config["model_type"] != "mt5")
    return {**config, "tie_word_embeddings": tied, "scale_decoder_outputs": scaled}


def t5x_table(config: Mapping[str, Any]) -> Table:
    """Returns the table for T5X's parameter names, as `t5x.open_checkpoint` gives them.

    Args:
      config: as `t5x.read_config` returns it; `scanned` (False where absent): the layers are stacked.
    """
    layer = "layers" if config.get("scanned", False) else "layers_{layer}"
    rules = [Rule("token_embedder/embedding", "token_embedder/embedding")]
    for stack, sublayers in _STACKS.items():
        leaves = [f"{norm}/scale" for _, norm, _ in sublayers]
        leaves += [f"mlp/{kernel}/kernel" for kernel in ("wi", "wi_0", "wi_1", "wo")]
        leaves += [f"{module}/{kernel}/kernel" for module, _, name in sublayers if name for kernel in _PROJECTIONS]
        rules += [Rule(f"{stack}/layers/{leaf}", f"{stack}/{layer}/{leaf}") for leaf in leaves]
        rules.append(Rule(f"{stack}/{stack}_norm/scale", f"{stack}/{stack}_norm/scale"))
        bias = "relpos_bias/rel_embedding"
        owner = f"{stack}/{layer}" if config["model_type"] == "umt5" else stack
        rules.append(Rule(f"{stack}/{bias}", f"{owner}/{bias}"))
    rules.append(Rule("decoder/logits_dense/kernel", "decoder/logits_dense/kernel"))
    return Table(tuple(rules))


# Format -> the table for a config.
TABLES = {"hf": hf_table, "t5x": t5x_table}
