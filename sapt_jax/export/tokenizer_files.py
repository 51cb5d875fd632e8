"""Puts a pretrained model's tokenizer beside a copy of its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from sapt_jax.pretrained import gguf_vocabulary
from sapt_jax.pretrained.tokenizer import FILES

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def write(location: Path, form: str, folder: Path) -> dict[str, Any]:
    """Copies a Hugging Face folder's tokenizer, or writes that of a GGUF file.

    Args:
      location: the model.
      form: its format, as `loading.format_of` names it.
      folder: where to write; it exists.

    Returns:
      The fields of config.json that the tokenizer needs there.

    Raises:
      ValueError: there is none, or one in a GGUF file of a kind that cannot be rebuilt here.
    """
    if form == "gguf":
        return _write_vocabulary(gguf_vocabulary.read(location), folder)
    if form != "hf" or not any((location / name).is_file() for name in FILES):
        raise ValueError(f"{location} has no tokenizer")
    for name in (*FILES, *_SETTINGS):
        if (location / name).is_file():
            shutil.copyfile(location / name, folder / name)
    return {}


def _write_vocabulary(vocabulary: gguf_vocabulary.Vocabulary, folder: Path) -> dict[str, Any]:
    if isinstance(vocabulary.model, tokenizers.Tokenizer):
        vocabulary.model.save(str(folder / "tokenizer.json"))
    else:
        (folder / "tokenizer.model").write_bytes(vocabulary.model.serialized_model_proto())
    settings: dict[str, Any] = {"add_bos_token": vocabulary.add_bos}
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    names = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    return {f"{name}_token_id": token for name, token in names.items()}
