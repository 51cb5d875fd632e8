"""Where transformers keeps the kernels that LoRA adapts."""

import functools
from collections.abc import Mapping
from typing import Any

from sapt_jax.models.families import Parameter, family_of, make_model, parameters
from sapt_jax.pet.lora import sites
from sapt_jax.state import Tree

# The path of an adapted module in the base tree, such as ("decoder", "layers", "self_attention", "query").
Site = tuple[str, ...]


def base_parameters(shape: Any) -> Mapping[str, Parameter]:
    """The base tree of a model of this shape, by path."""
    return parameters(make_model(shape, "float32", "none"))


def kernel_path(site: Site) -> str:
    """The path of an adapted module's kernel in the base tree."""
    return "/".join((*site, "kernel"))


@functools.cache
def module_names(shape: Any) -> dict[str, str]:
    """transformers' module of every parameter of the base tree, by path, with `{layer}` for the layer's number."""
    family = family_of(shape)
    # What a module is called depends on neither.
    table = family.tables["hf"]({"model_type": family.model_types[0], "tie_word_embeddings": False})
    rules = table.by_path()
    return {path: rules[path].name.removesuffix(".weight") for path in base_parameters(shape)}


def hf_modules(shape: Any, blocks: Tree) -> dict[Site, str]:
    """transformers' module of every site in a tree of LoRA blocks, with `{layer}` for the layer's number."""
    names = module_names(shape)
    return {site: names[kernel_path(site)] for site in sites(blocks)}
