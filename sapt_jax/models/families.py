"""The model families, an entry each; and from the config to a model and its base parameters, in their shardings."""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from sapt_jax import sharding
from sapt_jax.models import work
from sapt_jax.models.kernels import KERNELS
from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import (
    LLAMA_VARIANTS,
    T5_VARIANTS,
    LlamaConfig,
    T5Config,
    llama_config_from_hf,
    t5_config_from_hf,
)
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained import llama_weights, t5_weights
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from sapt_jax.pretrained.rules import Table
from sapt_jax.state import rng

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between the families of models.

    Attributes:
      shape: the class of its shapes.
      variants: shapes by name.
      model_types: Hugging Face's names of it.
      read_config: config.json and the file's name, for errors -> shape.
      make: (shape, dtype, remat, attention, dropout) -> Linen module. `attention` is one of `attentions`.
      drops: whether its models were trained with dropout; else it is always 0.
      tables: a checkpoint's format -> its config -> the rule table of its weights.
      is_encoder_decoder: whether an encoder reads the source.
      decoder_layers: shape -> number of decoder layers.
      teacher_forced: (shape, source, target) -> the work of one row of a training batch.
      decoded: (shape, source, new tokens, beams) -> the work of one answer with a cache of its final length.
    """

    name: str
    shape: type
    variants: Mapping[str, Any]
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], str], Any]
    make: Callable[[Any, Any, str, str, float], nn.Module]
    drops: bool
    attentions: tuple[str, ...]
    tables: Mapping[str, Callable[[Mapping[str, Any]], Table]]
    is_encoder_decoder: bool
    decoder_layers: Callable[[Any], int]
    teacher_forced: Callable[[Any, int, int], work.Work]
    decoded: Callable[[Any, int, int, int], work.Work]


FAMILIES = (
    Family(
        name="LLaMA",
        shape=LlamaConfig,
        variants=LLAMA_VARIANTS,
        model_types=llama_weights.MODEL_TYPES,
        read_config=llama_config_from_hf,
        make=lambda shape, dtype, remat, attention, dropout: Llama(shape, dtype, remat, attention),
        drops=False,
        attentions=KERNELS,
        tables=llama_weights.TABLES,
        is_encoder_decoder=False,
        decoder_layers=operator.attrgetter("num_layers"),
        teacher_forced=work.llama_teacher_forced,
        decoded=work.llama_decoded,
    ),
    Family(
        name="T5",
        shape=T5Config,
        variants=T5_VARIANTS,
        model_types=t5_weights.MODEL_TYPES,
        read_config=t5_config_from_hf,
        make=lambda shape, dtype, remat, attention, dropout: T5(shape, dtype, remat, dropout),
        drops=True,
        # No other kernel takes position biases.
        attentions=("auto", "xla"),
        tables=t5_weights.TABLES,
        is_encoder_decoder=True,
        decoder_layers=operator.attrgetter("num_decoder_layers"),
        teacher_forced=work.t5_teacher_forced,
        decoded=work.t5_decoded,
    ),
)
VARIANTS = {name: shape for family in FAMILIES for name, shape in family.variants.items()}
_BY_MODEL_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}
_BY_SHAPE = {family.shape: family for family in FAMILIES}


def family_of(shape: Any) -> Family:
    """The family of a shape."""
    return _BY_SHAPE[type(shape)]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array of a base tree: its shape and the logical axis of each of its dimensions, None where it has none."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@functools.cache
def parameters(model: nn.Module) -> Mapping[str, Parameter]:
    """The base tree of a model by path, as in "decoder/layers/self_attention/query/kernel"."""
    boxes = flatten_dict(sharding.boxed_params(model), sep="/")
    return types.MappingProxyType({path: Parameter(box.value.shape, box.names) for path, box in boxes.items()})


def make_model(shape: Any, dtype: str, remat: str, attention: str = "auto", dropout: float = 0.0) -> nn.Module:
    """The Linen module of a shape. `dtype`, `remat`, `attention` and `dropout` as in `config.model`.

    Raises:
      ValueError: an unknown dtype or attention, or an attention or dropout that does not go with the dtype or the
        architecture.
    """
    for field, value, choices in (("dtype", dtype, DTYPES), ("attention", attention, KERNELS)):
        if value not in choices:
            raise ValueError(f"config.model.{field}={value!r} is unknown; choose one of {', '.join(choices)}.")
    if attention == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"config.model.attention='cudnn' needs config.model.dtype='bfloat16', not {dtype!r}.")
    family = family_of(shape)
    if attention not in family.attentions:
        raise ValueError(f"config.model.attention={attention!r} takes none of {family.name}'s biases; choose auto.")
    if not 0 <= dropout < 1 or (dropout and not family.drops):
        allowed = "a rate from 0 to less than 1" if family.drops else "0: the architecture has no dropout"
        raise ValueError(f"config.model.dropout={dropout} for {family.name} must be {allowed}.")
    return family.make(shape, DTYPES[dtype], remat, attention, dropout)


def read_shape(path: str, variant: str) -> Any:
    """The model's shape: of the checkpoint at `path`, or of a named variant.

    Raises:
      ValueError: neither or an unknown one is named, or the architecture is not supported.
    """
    if path:
        config = read_model_config(path)
        if config["model_type"] in _BY_MODEL_TYPE:
            return _BY_MODEL_TYPE[config["model_type"]].read_config(config, f"{path}: config.json")
        raise ValueError(
            f"config.model.path={path}: model_type {config['model_type']!r} is not supported; name a checkpoint of "
            f"{', '.join(_BY_MODEL_TYPE)}."
        )
    if variant not in VARIANTS:
        raise ValueError(
            f"config.model.path is empty and config.model.variant={variant!r} is not one of "
            f"{', '.join(VARIANTS)}. "
            "Name a checkpoint, or a variant for random weights."
        )
    return VARIANTS[variant]


def load_params(model: nn.Module, path: str, param_dtype: str, mesh: Mesh, seed: int) -> Any:
    """The model's base parameters, straight into their shardings. Without a path they are random, from `seed`."""
    abstract = sharding.abstract_params(model, mesh, DTYPES[param_dtype])
    return load_pretrained(path, abstract) if path else init_params(model, abstract, seed)


def init_params(model: nn.Module, abstract: Any, seed: int) -> Any:
    """Random base parameters, created in the shardings and dtypes of `abstract`."""

    def init():
        ids = jnp.zeros((1, 2), jnp.int32)
        params = nn.meta.unbox(model.init(rng(seed, "base"), ids, ids == 0, ids, ids == 0)["params"])
        return jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract)

    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
