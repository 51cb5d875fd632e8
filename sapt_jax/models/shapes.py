"""Model shapes by name, and from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Kind of rope scaling -> the fields it needs.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor"),
    "yarn": ("factor",),
}
ROPE_OPTIONS = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
LLAMA_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
T5_ACTIVATIONS = ("relu", "gelu_new", "gelu", "silu")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA-family decoder. `rope_scaling` is Hugging Face's dictionary as sorted pairs, or ()."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...]
    max_positions: int
    tie_embeddings: bool
    activation: str = "silu"


def llama_config_from_hf(config: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """Reads a Hugging Face configuration of model_type llama.

    A field that is absent or null has the value that transformers takes for it, since a config.json holds only what
    existed when it was written (LLaMA 1 and 2: no rope_theta). The fields that say how big the model is are needed.

    Args:
      config: the parsed `config.json`.
      where: the file, for error messages.

    Raises:
      ValueError: another architecture, a missing field, or a feature that this decoder does not have.
    """
    if config.get("model_type") != "llama":
        raise ValueError(f"{where}: model_type is {config.get('model_type')!r}, this is the loader for 'llama'.")
    config = _given(
        config,
        where,
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    )
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            raise ValueError(f"{where}: {flag}=true is not supported; LLaMA's own checkpoints have no biases.")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    if not _is_positive(theta):
        raise ValueError(f"{where}: rope_theta must be a positive number, not {theta!r:.60}.")
    kind = rope.get("rope_type", rope.pop("type", "default"))
    _check_rope(kind, rope, where)
    rope["rope_type"] = kind
    heads = config["num_attention_heads"]
    kv_heads, head_dim = (
        config.get("num_key_value_heads", heads),
        config.get("head_dim", config["hidden_size"] // heads),
    )
    if heads % kv_heads or not head_dim or head_dim % 2:
        raise ValueError(
            f"{where}: {heads} heads of width {head_dim} with {kv_heads} for keys do not go together: the width must "
            "be even, and the heads a multiple of those for keys. Take the config.json that came with the weights."
        )
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        rope_scaling=() if kind == "default" else tuple(sorted(rope.items())),
        max_positions=config.get("max_position_embeddings", 2048),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        activation=_known(config.get("hidden_act", "silu"), "hidden_act", LLAMA_ACTIVATIONS, where),
    )


# Fields that count something -> the most that any model comes near to. Arrays and layers are made of them.
_MOST = {"vocab_size": 10**7, "num_layers": 10**4, "num_hidden_layers": 10**4, "num_decoder_layers": 10**4}
_MOST |= dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "d_ff"), 10**6)
_MOST |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "head_dim", "d_kv"), 10**5)
_MOST |= {"relative_attention_num_buckets": 10**5, "relative_attention_max_distance": 10**9}
_MOST |= {"max_position_embeddings": 10**9}
_NUMBERS = ("rms_norm_eps", "layer_norm_epsilon", "rope_theta")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "is_gated_act", "scale_decoder_outputs")
_TEXTS = ("hidden_act", "feed_forward_proj", "dense_act_fn")


def _given(config: Mapping[str, Any], where: str, needed: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are there and not null, of the types and sizes that they must have."""
    given = {name: value for name, value in config.items() if value is not None}
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{where}: missing {', '.join(missing)}. Take the config.json that came with the weights.")
    for name, value in given.items():
        if name in _MOST and not (type(value) is int and 1 <= value <= _MOST[name]):
            wanted = f"a whole number from 1 to {_MOST[name]}"
        elif name in _NUMBERS and not _is_positive(value):
            wanted = "a positive number"
        elif name in _FLAGS and not isinstance(value, bool):
            wanted = "true or false"
        elif name in _TEXTS and not isinstance(value, str):
            wanted = "a string"
        elif name in ("rope_scaling", "rope_parameters") and not isinstance(value, Mapping):
            wanted = "an object"
        else:
            continue
        raise ValueError(
            f"{where}: {name} must be {wanted}, not {value!r:.60}. Take the config.json that came with the weights."
        )
    return given


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _known(value: str, field: str, known: tuple[str, ...], where: str) -> str:
    if value not in known:
        raise ValueError(f"{where}: {field} {value!r} is not supported; supported are {', '.join(known)}.")
    return value


def _check_rope(kind: str, rope: Mapping[str, Any], where: str) -> None:
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ValueError(f"{where}: rope scaling {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}.")
    given = {name for name, value in rope.items() if value is not None and name != "rope_type"}
    if unknown := sorted(given - {*ROPE_OPTIONS, *(name for needed in ROPE_TYPES.values() for name in needed)}):
        raise ValueError(f"{where}: rope scaling {kind!r} with {', '.join(unknown)} is not supported.")
    if lacking := [name for name in ROPE_TYPES[kind] if name not in given]:
        raise ValueError(f"{where}: rope scaling {kind!r} lacks {', '.join(lacking)}.")
    if wrong := sorted(name for name in given if not _is_positive(rope[name])):
        raise ValueError(
            f"{where}: {wrong[0]} of the rope scaling must be a positive number, not {rope[wrong[0]]!r:.60}."
        )


_LLAMA3_SCALING = (
    ("factor", 8.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 8192),
    ("rope_type", "llama3"),
)
_LLAMA32_SCALING = (("factor", 32.0), *_LLAMA3_SCALING[1:])

_LLAMA2_7B = LlamaConfig(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=11008,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=(),
    max_positions=4096,
    tie_embeddings=False,
)
_LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=(),
    max_positions=8192,
    tie_embeddings=False,
)
_LLAMA32_1B = LlamaConfig(
    vocab_size=128256,
    d_model=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    d_ff=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=_LLAMA32_SCALING,
    max_positions=131072,
    tie_embeddings=True,
)

LLAMA_VARIANTS = {
    "llama-tiny": LlamaConfig(
        vocab_size=384,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=64,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=(),
        max_positions=512,
        tie_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        d_model=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        norm_eps=1e-5,
        rope_theta=100000.0,
        rope_scaling=(),
        max_positions=8192,
        tie_embeddings=True,
    ),
    "llama-2-7b": _LLAMA2_7B,
    "llama-2-13b": dataclasses.replace(
        _LLAMA2_7B, d_model=5120, num_layers=40, num_heads=40, num_kv_heads=40, d_ff=13824
    ),
    "llama-3-8b": _LLAMA3_8B,
    "llama-3.1-8b": dataclasses.replace(_LLAMA3_8B, rope_scaling=_LLAMA3_SCALING, max_positions=131072),
    "llama-3.2-1b": _LLAMA32_1B,
    "llama-3.2-3b": dataclasses.replace(_LLAMA32_1B, d_model=3072, num_layers=28, num_heads=24, head_dim=128),
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5-family encoder-decoder.

    `scale_outputs` multiplies the decoder's output by d_model**-0.5; None does so where embeddings are tied. With
    `bias_per_layer` each layer has its own relative position bias (umt5, and T5X's scanned models), else a stack's
    layers share one.
    """

    vocab_size: int
    d_model: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    d_ff: int
    activation: str
    gated: bool
    norm_eps: float
    relative_buckets: int
    relative_max_distance: int
    tie_embeddings: bool
    bias_per_layer: bool = False
    scale_outputs: bool | None = None


def t5_config_from_hf(config: Mapping[str, Any], where: str = "config.json") -> T5Config:
    """Reads a Hugging Face configuration of model_type t5, mt5 or umt5.

    A field that is absent or null has the value that transformers takes for it: T5 1.0's config.json was written before
    most of them existed. The fields that say how big the model is are needed.

    Args:
      config: the parsed `config.json`. Its `tie_word_embeddings` is believed, so it must say what the weights say:
        transformers 5 writes true for every T5.
      where: the file, for error messages.

    Raises:
      ValueError: another architecture, a missing field, or a feature that this model does not have.
    """
    kind = config.get("model_type")
    if kind not in ("t5", "mt5", "umt5"):
        raise ValueError(f"{where}: model_type is {kind!r}, this is the loader for 't5', 'mt5' and 'umt5'.")
    config = _given(config, where, ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff"))
    if config.get("decoder_start_token_id", 0) != 0:
        raise ValueError(
            f"{where}: decoder_start_token_id is {config['decoder_start_token_id']}; this T5 starts its answers with 0."
        )
    activation, gated = _t5_mlp(config, where)
    tied = config.get("tie_word_embeddings", True)
    scaled = config.get("scale_decoder_outputs", tied)
    return T5Config(
        vocab_size=config["vocab_size"],
        d_model=config["d_model"],
        num_encoder_layers=config["num_layers"],
        num_decoder_layers=config.get("num_decoder_layers", config["num_layers"]),
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        d_ff=config["d_ff"],
        activation=activation,
        gated=gated,
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_max_distance=config.get("relative_attention_max_distance", 128),
        tie_embeddings=tied,
        bias_per_layer=kind == "umt5",
        scale_outputs=None if scaled == tied else scaled,
    )


def _t5_mlp(config: Mapping[str, Any], where: str) -> tuple[str, bool]:
    projection = config.get("feed_forward_proj", "relu" if config["model_type"] == "t5" else "gated-gelu")
    activation = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    # transformers derives these two from the field before, then lets a config.json that holds them overrule it.
    gated = bool(config.get("is_gated_act", projection.startswith("gated-")))
    field = "dense_act_fn" if "dense_act_fn" in config else "feed_forward_proj"
    return _known(config.get("dense_act_fn", activation), field, T5_ACTIVATIONS, where), gated


_T5_SMALL = T5Config(
    vocab_size=32128,
    d_model=512,
    num_encoder_layers=6,
    num_decoder_layers=6,
    num_heads=8,
    head_dim=64,
    d_ff=2048,
    activation="relu",
    gated=False,
    norm_eps=1e-6,
    relative_buckets=32,
    relative_max_distance=128,
    tie_embeddings=True,
)
# The 1.1 shapes are also those of the LM-adapted and FLAN checkpoints.
_T5_1_1_SMALL = T5Config(
    vocab_size=32128,
    d_model=512,
    num_encoder_layers=8,
    num_decoder_layers=8,
    num_heads=6,
    head_dim=64,
    d_ff=1024,
    activation="gelu_new",
    gated=True,
    norm_eps=1e-6,
    relative_buckets=32,
    relative_max_distance=128,
    tie_embeddings=False,
)

T5_VARIANTS = {
    "t5-tiny": dataclasses.replace(
        _T5_1_1_SMALL,
        vocab_size=384,
        d_model=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        head_dim=16,
        d_ff=64,
    ),
    "t5-small": _T5_SMALL,
    "t5-base": dataclasses.replace(
        _T5_SMALL, d_model=768, num_encoder_layers=12, num_decoder_layers=12, num_heads=12, d_ff=3072
    ),
    "t5-large": dataclasses.replace(
        _T5_SMALL, d_model=1024, num_encoder_layers=24, num_decoder_layers=24, num_heads=16, d_ff=4096
    ),
    "t5-3b": dataclasses.replace(
        _T5_SMALL, d_model=1024, num_encoder_layers=24, num_decoder_layers=24, num_heads=32, head_dim=128, d_ff=16384
    ),
    "t5-11b": dataclasses.replace(
        _T5_SMALL, d_model=1024, num_encoder_layers=24, num_decoder_layers=24, num_heads=128, head_dim=128, d_ff=65536
    ),
    "t5-v1_1-small": _T5_1_1_SMALL,
    "t5-v1_1-base": dataclasses.replace(
        _T5_1_1_SMALL, d_model=768, num_encoder_layers=12, num_decoder_layers=12, num_heads=12, d_ff=2048
    ),
    "t5-v1_1-large": dataclasses.replace(
        _T5_1_1_SMALL, d_model=1024, num_encoder_layers=24, num_decoder_layers=24, num_heads=16, d_ff=2816
    ),
    "t5-v1_1-xl": dataclasses.replace(
        _T5_1_1_SMALL, d_model=2048, num_encoder_layers=24, num_decoder_layers=24, num_heads=32, d_ff=5120
    ),
    "t5-v1_1-xxl": dataclasses.replace(
        _T5_1_1_SMALL, d_model=4096, num_encoder_layers=24, num_decoder_layers=24, num_heads=64, d_ff=10240
    ),
}
