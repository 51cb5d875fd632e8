"""A Hugging Face model folder as a source: safetensors or torch .bin, in one file or in shards."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sapt_jax.pretrained.rules import ArraySource, Index, Source

# Configs older than the field model_type name a class alone, some by a name that the class no longer has.
_CLASSES = {
    "LLaMAForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "MT5ForConditionalGeneration": "mt5",
    "T5ForConditionalGeneration": "t5",
    "T5WithLMHeadModel": "t5",
    "UMT5ForConditionalGeneration": "umt5",
}
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a folder's config.json; a model_type that it lacks is that of its `architectures`.

    Raises:
      FileNotFoundError: it has none.
      ValueError: it is broken, or says neither a model_type nor a known architecture.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a Hugging Face model folder or a .gguf file")
    config = read_json(file)
    if config.get("model_type"):
        return config
    for name in config.get("architectures") or ():
        if name in _CLASSES:
            return {**config, "model_type": _CLASSES[name]}
    raise ValueError(f"{file} has no field model_type: it is not the config of a transformers model")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; a broken file gives a ValueError with its name, line and column."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): fetch it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, an object is needed")
    return content


def open_folder(folder: Path) -> Source:
    """Opens a folder's weights: safetensors where it has them, else torch's .bin.

    Raises:
      FileNotFoundError: there are no weights, or a shard that the index lists is missing.
      ModuleNotFoundError: .bin weights need PyTorch.
      ValueError: a file is broken, or two shards hold a tensor of the same name.
    """
    for name, opened in ((_SAFETENSORS, _open_safetensors), (_TORCH, _open_torch)):
        if files := _files(folder, name):
            return opened(folder, files)
    kinds = " or ".join(f"{name}[.index.json]" for name in (_SAFETENSORS, _TORCH))
    raise FileNotFoundError(f"{folder} has no weights: looked for {kinds}")


class SafetensorsSource:
    """The tensors of one or more safetensors files; each read touches only the bytes that it needs."""

    def __init__(self, label: str, files: list[Path]):
        self.label = label
        self._handles = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a valid safetensors file ({error}): fetch it anew") from error
            _add(self._handles, {name: handle for name in handle.keys()}, file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        part = self._handles[name].get_slice(name)
        if isinstance(index[0], np.ndarray):
            return part[(slice(None), *index[1:])][index[0]]
        return part[index]


def _files(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: fetch it anew")
        files = [folder / file for file in sorted(set(weight_map.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder} lacks files that {index.name} lists: {', '.join(absent)}")
        return files
    return [folder / name] if (folder / name).is_file() else []


def _add(tensors: dict[str, Any], more: Mapping[str, Any], file: Path) -> None:
    if twice := sorted(set(tensors) & set(more)):
        raise ValueError(f"{file} holds tensors that another shard holds too: {', '.join(twice)}")
    tensors.update(more)


def _open_safetensors(folder: Path, files: list[Path]) -> Source:
    return SafetensorsSource(str(folder), files)


def _open_torch(folder: Path, files: list[Path]) -> Source:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{folder} holds torch .bin weights, and PyTorch is not installed: install it "
            "(pip install torch), or give a folder with safetensors."
        ) from None
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        try:
            # Only the zip format, torch's own since 1.6, can be memory-mapped.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:
            raise ValueError(f"{file} cannot be read as plain torch weights ({error})") from error
        _add(arrays, {name: _as_numpy(torch, tensor) for name, tensor in tensors.items()}, file)
    return ArraySource(str(folder), arrays)


def _as_numpy(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
