"""Writes a base model as a transformers folder, with one mixture of LoRA blocks merged into it or as it is."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from sapt_jax import sharding
from sapt_jax.export import tokenizer_files
from sapt_jax.export.learned import Learned
from sapt_jax.export.sites import kernel_path
from sapt_jax.models.families import DTYPES, family_of, make_model
from sapt_jax.models.t5 import START_ID
from sapt_jax.pet.lora import sites
from sapt_jax.pretrained import hf, rules
from sapt_jax.pretrained.loading import TABLES, format_of, open_pretrained, read_model_config
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.storage.new_folder import new_folder

_GENERATION = "generation_config.json"


def write_merged(learned: Learned, weights: Sequence[float] | None, out: Path) -> None:
    """Writes the base model with W + sum_t weights[t] * (alpha / R) * A_t B_t in place of every adapted W.

    Sums are taken in float32 and stored in config.model.param_dtype, as the base is.

    Args:
      weights: as of `Learned.mixture`.

    Raises:
      ValueError: the run learned soft prompts, it has no base model, or from `Learned.mixture`.
      FileExistsError: the folder exists.
    """
    if learned.config.pet.kind != "lora":
        raise ValueError(
            "a soft prompt goes before the input and is no part of any weight, so it cannot be merged: to-peft "
            "writes it as an adapter, to-torch with the whole model"
        )
    deltas = merged_deltas(learned, learned.mixture(weights))
    with new_folder(out) as folder:
        write_base(learned, folder, deltas)


def merged_deltas(learned: Learned, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What a mixture [T] adds to the kernels of our base tree: float32 [layers, D, H], by path."""
    options, deltas = learned.config.pet, {}
    for site, block in sites(learned.frozen.bank).items():
        columns = block["a"] * (weights * (options.alpha / options.rank))[:, None]
        deltas[kernel_path(site)] = np.einsum("KDTR,KTRH->KDH", columns, block["b"], optimize=True)
    return deltas


def write_base(learned: Learned, folder: Path, deltas: dict[str, np.ndarray]) -> None:
    """Writes the base model into a folder that exists: weights with `deltas` added, config, tokenizer.

    Raises:
      ValueError: the run's base model has random weights.
    """
    path = learned.config.model.path
    if not path:
        raise ValueError(
            f"the run's base model is {learned.config.model.variant!r} with random weights, which are nowhere to read: "
            "only a run with config.model.path has a base model to write"
        )
    location = resolve_path(path)
    form = format_of(location)
    # A folder's own config.json: transformers knows what it says of heads that it ties itself.
    config = hf.read_config(location) if form == "hf" else read_model_config(location)
    dtype = learned.config.model.param_dtype
    config = {name: value for name, value in config.items() if name not in ("scanned", "torch_dtype")}
    config["dtype"] = dtype
    table = TABLES[config["model_type"], "hf"](read_model_config(location))
    tensors = {}
    for name, array in _tensors(_open(learned.shape, path, dtype), table, deltas):
        tensors[name] = np.ascontiguousarray(array)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    try:
        config |= tokenizer_files.write(location, "gguf" if form == "gguf" else "hf", folder)
    except ValueError as error:
        print(f"without a tokenizer: {error}")
    if (location / _GENERATION).is_file():
        shutil.copyfile(location / _GENERATION, folder / _GENERATION)
    if family_of(learned.shape).is_encoder_decoder:
        config.setdefault("decoder_start_token_id", START_ID)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _open(shape: Any, path: str, dtype: str) -> dict[str, rules.Parameter]:
    alone = sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices("cpu")[:1])
    model = make_model(shape, "float32", "none")
    return open_pretrained(path, sharding.abstract_params(model, alone, DTYPES[dtype]))


def _tensors(parameters: dict[str, rules.Parameter], table: rules.Table, deltas: dict[str, np.ndarray]) -> Any:
    by_path = table.by_path()
    for path, parameter in parameters.items():
        rule = by_path[path]
        for name, place in zip(rule.names(parameter.shape), parameter.places, strict=True):
            array = parameter.read(place)
            if path in deltas:
                array = array.astype(np.float32) + deltas[path][place]
            yield name, rule.to_foreign(array).astype(parameter.dtype)
