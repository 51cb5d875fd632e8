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
from sapt_jax.storage.names import check_name

# Configs older than the field model_type name a class alone, some by a name that the class no longer has.
_CLASSES = {
    "LLaMAForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "MT5ForConditionalGeneration": "mt5",
    "T5ForConditionalGeneration": "t5",
    "T5WithLMHeadModel": "t5",
    "UMT5ForConditionalGeneration": "umt5",
}
_FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
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
    if config.get("quantization_config"):
        raise ValueError(
            f"{file} sets quantization_config: quantised weights cannot be read. Give the folder that the model was "
            "quantised from."
        )
    kind = config.get("model_type")
    if kind and not isinstance(kind, str):
        raise ValueError(f"{file}: model_type must be a string, not {kind!r:.60}")
    if kind:
        return config
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name in _CLASSES:
            return {**config, "model_type": _CLASSES[name]}
    raise ValueError(f"{file} has no field model_type: it is not the config of a transformers model")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; a broken file gives a ValueError with its name, line and column."""
    try:
        # Some editors put a byte order mark before it.
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
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
        self._places: dict[str, tuple[Any, Path]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a valid safetensors file ({error}): fetch it anew") from error
            _add(self._places, {name: (handle, file) for name in handle.keys()}, file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, (handle, _) in self._places.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        handle, file = self._places[name]
        part = handle.get_slice(name)
        if part.get_dtype() in _FLOAT8:
            return _mapped(file, name, _FLOAT8[part.get_dtype()])[index]
        if isinstance(index[0], np.ndarray):
            return part[(slice(None), *index[1:])][index[0]]
        return part[index]


def _mapped(file: Path, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor of a safetensors file whose type numpy does not have, memory-mapped."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        about = json.loads(opened.read(length))[name]
    start, stop = about["data_offsets"]
    stored = np.memmap(file, np.uint8, "r", offset=8 + length + start, shape=(stop - start,))
    return stored.view(dtype).reshape(about["shape"])


def _files(folder: Path, name: str) -> list[Path]:
    # An index may be left over from when the model was saved in shards.
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: fetch it anew")
    names = dict.fromkeys(check_name(file, f"{index}: weight_map of {key}") for key, file in weight_map.items())
    if absent := [file for file in sorted(names) if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder} lacks files that {index.name} lists: {', '.join(absent)}")
    return [folder / file for file in sorted(names)]


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
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{file} holds a {type(tensors).__name__}, not tensors by name: save model.state_dict()")
        _add(arrays, {name: _as_numpy(torch, tensor, f"{file}: {name}") for name, tensor in tensors.items()}, file)
    return ArraySource(str(folder), arrays)


def _as_numpy(torch: Any, tensor: Any, where: str) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        form = f"{tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{where} is a {form}, a plain tensor is needed: save model.state_dict()")
    tensor = tensor.detach()
    for kind, bits, ours in (
        (torch.bfloat16, torch.int16, ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, torch.int8, ml_dtypes.float8_e4m3fn),
        (torch.float8_e5m2, torch.int8, ml_dtypes.float8_e5m2),
    ):
        if tensor.dtype == kind:
            return tensor.view(bits).numpy().view(ours)
    return tensor.numpy()
