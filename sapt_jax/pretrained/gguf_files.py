"""A llama.cpp GGUF file as a source: tensors are dequantised as they are read, metadata becomes a config.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sapt_jax.pretrained.rules import Index

# What llama.cpp's converter took to write rope_freqs.weight, in every Llama 3.1, 3.2 and 3.3 (the factor
# differs).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# What llama.cpp takes where a file has no llama.rope.freq_base, as those of LLaMA 1 and 2 have none.
_ROPE_BASE = 10000.0
_VALUES_AT_ONCE = 2**20
_PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """A model in GGUF.

    Attributes:
      first: the file, or the first of its parts, which has the metadata.
      tensors: of all parts.
    """

    first: gguf.GGUFReader
    tensors: list[gguf.ReaderTensor]


def open_gguf(file: Path) -> GGUFFile:
    """Opens a GGUF file, memory-mapped, with all the parts beside it where it is one of several.

    Parsing the vocabulary takes seconds, so the last model is kept.

    Raises:
      ValueError: it is not a GGUF file, or its parts do not make up a model.
      FileNotFoundError: another part is missing.
    """
    return _open(file.resolve(), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open(file: Path, _modified: int) -> GGUFFile:
    reader = _read(file)
    field = reader.get_field("split.count")
    count = 1 if field is None else field.contents()
    if count == 1:
        return GGUFFile(reader, reader.tensors)
    match = _PART.fullmatch(file.name)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"{file} is one of {count} parts, and is not called NAME-00001-of-{count:05}.gguf as they are: give it "
            "its name back, or make one file of them with llama.cpp's llama-gguf-split --merge"
        )
    parts = [file.with_name(f"{match['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f"{file} is one of {count} parts; {', '.join(absent)} must lie beside it: fetch it too")
    readers = [reader if part == file else _read(part) for part in parts]
    tensors = [tensor for one in readers for tensor in one.tensors]
    wanted = readers[0].get_field("split.tensors.count")
    if wanted is not None and wanted.contents() != len(tensors):
        raise ValueError(f"{file}: its parts hold {len(tensors)} tensors of {wanted.contents()}: fetch them anew")
    return GGUFFile(readers[0], tensors)


def _read(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except Exception as error:
        raise ValueError(f"{file} is not a readable GGUF file ({error}): fetch it anew") from error


class GGUFSource:
    """The tensors of a GGUF file as float32 (float16 where stored so), in numpy's axis order."""

    def __init__(self, file: Path):
        self.label = str(file)
        self._tensors = {tensor.name: tensor for tensor in open_gguf(file).tensors}
        self._last: tuple[str, slice | np.ndarray, np.ndarray] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        rows = index[0]
        # Shards along the other axes ask for the same rows one after another.
        if self._last is None or self._last[0] != name or not np.array_equal(self._last[1], rows):
            self._last = None  # the old one goes before the new one comes
            self._last = (name, rows, self._dequantise(name, rows))
        return self._last[2][(slice(None), *index[1:])]

    def _dequantise(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        tensor = self._tensors[name]
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            return tensor.data[rows]
        try:
            if tensor.data.ndim == 1:  # its one axis counts bytes
                return gguf.quants.dequantize(tensor.data, tensor.tensor_type)[rows]
            quantised = tensor.data[rows]
            out = np.empty((len(quantised), *tensor.shape[-2::-1]), np.float32)
            # The gguf package needs twice the memory of what it is given.
            step = max(1, _VALUES_AT_ONCE // int(np.prod(out.shape[1:])))
            for start in range(0, len(out), step):
                block = slice(start, start + step)
                out[block] = gguf.quants.dequantize(quantised[block], tensor.tensor_type)
            return out
        except NotImplementedError as error:
            raise ValueError(
                f"{self.label}: tensor {name} is of type {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantise. Use a file quantised to F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant."
            ) from error


def read_config(file: Path) -> dict[str, Any]:
    """Turns a GGUF file's metadata into the config.json that transformers would hold for the model.

    Raises:
      ValueError: a field is missing, or the model has something that the architecture here has not.
    """
    metadata = Metadata(file)
    architecture = metadata.need("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file} holds a model of architecture {architecture!r}; only 'llama' can be read")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if metadata.get(key):
            raise ValueError(f"{file} sets {key} = {metadata.get(key)}, which this LLaMA does not have")
    shapes = {tensor.name: [int(size) for size in tensor.shape[::-1]] for tensor in metadata.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{file} has no tensor token_embd.weight: it holds no language model")
    heads = metadata.count("llama.attention.head_count")
    width = metadata.count("llama.embedding_length")
    head_dim = metadata.count("llama.attention.key_length", width // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise ValueError(f"{file}: {key} = {metadata.get(key)} differs from the head width {head_dim}")
    theta = metadata.get("llama.rope.freq_base", _ROPE_BASE)
    if not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        raise ValueError(f"{file}: llama.rope.freq_base must be a positive number, not {theta!r:.60}")
    config = {
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": metadata.need("llama.feed_forward_length"),
        "num_hidden_layers": metadata.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.need("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(metadata, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": metadata.get("llama.context_length"),
    }
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config


class Metadata:
    """A GGUF file's key-value pairs, and errors that name the file and the key."""

    def __init__(self, file: Path):
        self.file = file
        opened = open_gguf(file)
        self.reader, self.tensors = opened.first, opened.tensors

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value, or the default where the file lacks the key."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        """Returns the value; a missing key is a ValueError."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.file} has no metadata field {key}: convert the model again with llama.cpp")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Returns a count that may be stored once or for each layer; layers that differ are a ValueError."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, list) and len({str(one) for one in value}) != 1:
            raise ValueError(f"{self.file}: {key} differs between layers ({value}), which this LLaMA does not have")
        value = value[0] if isinstance(value, list) else value
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.file}: {key} must be a positive whole number, not {value!r:.60}")
        return value

    def under(self, prefix: str) -> dict[str, Any]:
        """Returns the values whose key starts with the prefix, by the rest of the key."""
        keys = [key for key in self.reader.fields if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.get(key) for key in keys}


def _rope_scaling(metadata: Metadata, theta: float, head_dim: int) -> dict[str, Any] | None:
    frequencies = [tensor for tensor in metadata.tensors if tensor.name == "rope_freqs.weight"]
    fields = metadata.under("llama.rope.scaling.")
    fields.pop("finetuned", None)
    kind = fields.pop("type", "none")
    if frequencies:
        if kind != "none":
            raise ValueError(f"{metadata.file} has both rope_freqs.weight and llama.rope.scaling.type = {kind!r}")
        return _llama3_scaling(np.asarray(frequencies[0].data, np.float32), theta, head_dim, metadata.file)
    if kind == "none":
        legacy = metadata.get("llama.rope.scale_linear", 1.0)
        return None if legacy == 1.0 else {"rope_type": "linear", "factor": legacy}
    names = {"factor": "factor"}
    if kind == "yarn":
        names |= {
            "original_context_length": "original_max_position_embeddings",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
    elif kind == "linear":
        fields.pop("original_context_length", None)
    else:
        raise ValueError(f"{metadata.file}: llama.rope.scaling.type = {kind!r}; only 'linear' and 'yarn' can be read")
    if "factor" not in fields or (unknown := sorted(set(fields) - set(names))):
        what = "is missing factor" if "factor" not in fields else f"also sets {', '.join(unknown)}"
        raise ValueError(f"{metadata.file}: llama.rope.scaling of type {kind!r} {what}, which cannot be read")
    return {"rope_type": kind} | {names[key]: value for key, value in fields.items()}


def _llama3_scaling(divisors: np.ndarray, theta: float, head_dim: int, file: Path) -> dict[str, Any] | None:
    """Recovers Llama 3's rope_scaling from the stored divisors of the frequencies, [head_dim / 2]."""
    if np.all(divisors == 1.0):
        return None
    factor = float(divisors.max())
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    turns = _LLAMA3_ROPE["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((turns / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{file}: rope_freqs.weight is not Llama 3's with {_LLAMA3_ROPE}. "
            "Load the Hugging Face folder that the file was made from."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
