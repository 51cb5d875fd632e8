"""From the config to a model and its base parameters, in their shardings."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sapt_jax import sharding
from sapt_jax.models.kernels import KERNELS
from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import (
    LLAMA_VARIANTS,
    T5_VARIANTS,
    T5Config,
    llama_config_from_hf,
    t5_config_from_hf,
)
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained.loading import load_pretrained, read_model_config

VARIANTS = LLAMA_VARIANTS | T5_VARIANTS
CONFIG_READERS = {
    "llama": llama_config_from_hf,
    "t5": t5_config_from_hf,
    "mt5": t5_config_from_hf,
    "umt5": t5_config_from_hf,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(model_config: Any, dtype: str, remat: str, attention: str = "auto") -> nn.Module:
    """The Linen module of a shape. `dtype`, `remat` and `attention` as in `config.model`.

    Raises:
      ValueError: an unknown dtype or attention, or an attention that does not go with the dtype or the architecture.
    """
    if dtype not in DTYPES:
        raise ValueError(f"config.model.dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    if attention not in KERNELS:
        raise ValueError(f"config.model.attention={attention!r} is unknown; choose one of {', '.join(KERNELS)}.")
    if attention == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"config.model.attention='cudnn' needs config.model.dtype='bfloat16', not {dtype!r}.")
    if not isinstance(model_config, T5Config):
        return Llama(model_config, DTYPES[dtype], remat, attention)
    if attention not in ("auto", "xla"):
        raise ValueError(f"config.model.attention={attention!r} takes none of T5's biases; choose auto.")
    return T5(model_config, DTYPES[dtype], remat)


def read_shape(path: str, variant: str) -> Any:
    """The model's shape: of the checkpoint at `path`, or of a named variant.

    Raises:
      ValueError: neither or an unknown one is named, or the architecture is not supported.
    """
    if path:
        config = read_model_config(path)
        if config["model_type"] in CONFIG_READERS:
            return CONFIG_READERS[config["model_type"]](config, f"{path}: config.json")
        raise ValueError(
            f"config.model.path={path}: model_type {config['model_type']!r} is not supported; name a checkpoint of "
            f"{', '.join(CONFIG_READERS)}."
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
        params = nn.meta.unbox(model.init(jax.random.key(seed), ids, ids == 0, ids, ids == 0)["params"])
        return jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract)

    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
