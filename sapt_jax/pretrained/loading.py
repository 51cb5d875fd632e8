"""Reads a pretrained model, whatever its format: `read_model_config`, then `load_pretrained`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sapt_jax.pretrained import base_checkpoint, gguf_files, hf, llama_weights, rules, t5_weights, t5x_checkpoints
from sapt_jax.pretrained.locate import resolve_path

FORMATS = {
    "hf": "a Hugging Face model folder",
    "gguf": "a .gguf file",
    "t5x": "a T5X checkpoint",
    "base": "a base checkpoint",
}

# (model_type, format) -> the table for a config.
TABLES: dict[tuple[str, str], Callable[[Mapping[str, Any]], rules.Table]] = {
    (kind, form): table
    for family in (llama_weights, t5_weights)
    for kind in family.MODEL_TYPES
    for form, table in family.TABLES.items()
}

_SOURCES: dict[str, Callable[[Path], rules.Source]] = {
    "hf": hf.open_folder,
    "gguf": gguf_files.GGUFSource,
    "t5x": t5x_checkpoints.open_checkpoint,
    "base": base_checkpoint.open_params,
}


def read_model_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a pretrained model's config in the form of Hugging Face's config.json.

    Args:
      path: a Hugging Face folder, a .gguf file, a T5X checkpoint (its folder, or an older one's file), a base
        checkpoint (see `base_checkpoint`), or an address for `resolve_path`.

    Raises:
      FileNotFoundError: nothing is there, or the folder has no config.json.
      ValueError: the file is broken or holds another kind of model.
    """
    location = resolve_path(path)
    form = format_of(location)
    if form == "gguf":
        return gguf_files.read_config(location)
    if form == "t5x":
        return t5x_checkpoints.read_config(location)
    config = hf.read_config(location)
    if form == "hf" and config["model_type"] in t5_weights.MODEL_TYPES:
        return t5_weights.settle_tie(config, hf.open_folder(location))
    return config


def load_pretrained(path: str | os.PathLike[str], abstract_params: Mapping[str, Any]) -> dict[str, Any]:
    """Loads a pretrained model's weights straight into their shardings.

    Args:
      path: as for `read_model_config`.
      abstract_params: the base parameter tree with jax.ShapeDtypeStruct leaves; a leaf's `sharding`, where
        given, says where its array goes.

    Returns:
      The tree with jax arrays.

    Raises:
      FileNotFoundError: the path, the weights or a shard is missing.
      ValueError: lists every key that is missing, unused or of the wrong shape.
    """
    location = resolve_path(path)
    return rules.load(_open(location), model_table(location), abstract_params)


def open_pretrained(path: str | os.PathLike[str], abstract_params: Mapping[str, Any]) -> dict[str, rules.Parameter]:
    """Finds a pretrained model's weights without reading them: arguments and errors as for `load_pretrained`."""
    location = resolve_path(path)
    return rules.open_parameters(_open(location), model_table(location), abstract_params)


def model_table(path: str | os.PathLike[str]) -> rules.Table:
    """Returns the rule table of a pretrained model, from its config and format.

    Raises:
      ValueError: there is no table for its model_type.
    """
    location = resolve_path(path)
    form = format_of(location)
    if form == "base":
        return rules.identity(_open(location).shapes())
    config = read_model_config(location)
    if (config["model_type"], form) not in TABLES:
        known = ", ".join(sorted(kind for kind, of in TABLES if of == form))
        raise ValueError(f"{location}: model_type {config['model_type']!r} cannot be read; known are: {known}")
    return TABLES[config["model_type"], form](config)


def format_of(location: Path) -> str:
    """Returns which of `FORMATS` lies at a path that exists.

    Raises:
      ValueError: none of them.
    """
    if location.is_dir():
        if base_checkpoint.is_base_checkpoint(location):
            return "base"
        if base_checkpoint.is_base_checkpoint(location.parent) and location.name == base_checkpoint.PARAMS:
            raise ValueError(f"{location} holds the parameters of a base checkpoint: give {location.parent}")
        index = location / t5x_checkpoints.INDEX
        return "t5x" if index.is_file() and not (location / "config.json").exists() else "hf"
    if location.suffix == ".gguf":
        return "gguf"
    if t5x_checkpoints.INDEX in location.name:
        return "t5x"
    *others, last = FORMATS.values()
    raise ValueError(f"{location} is neither {', '.join(others)} nor {last}")


def _open(location: Path) -> rules.Source:
    return _SOURCES[format_of(location)](location)
