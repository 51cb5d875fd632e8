"""Tokenizers from where the model lies: SentencePiece, tokenizer.json, or the vocabulary in a GGUF file."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jinja2
import sentencepiece
import tokenizers

from sapt_jax.pretrained import gguf_vocabulary
from sapt_jax.pretrained.hf import read_json
from sapt_jax.pretrained.locate import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Those that hold a whole tokenizer. vocab.json and merges.txt do not say how text is split before merging, and
# transformers makes up a tokenizer without a vocabulary for a folder that has none of them.
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")
# LLaMA 3's templates write today's date unless told one, and prompts must not change overnight: their own default.
_TEMPLATE_DATE = "26 Jul 2024"


class Backend(Protocol):
    """What turns text into ids and back."""

    has_chat_template: bool

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def piece(self, token: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
      vocab_size: ids run from 0 to vocab_size - 1 (the model's embedding may have more rows).
      pad_id: the model's own padding id where the vocabulary has it, else eos_id.
      eos_id: what ends an answer.
      bos_id: what begins a text, or None.
      add_bos: whether the model was trained with bos_id before each text.
      text_size: ids of a text run from 0 to text_size - 1; those beyond are special tokens that were added.
      unk_id: what stands for text that the vocabulary cannot spell, or None.
      backend: the library that does the work.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int | None
    add_bos: bool
    unk_id: int | None
    text_size: int
    backend: Backend

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how it wants the turns of a chat to be written."""
        return self.backend.has_chat_template

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens: one that the text spells is taken as text."""
        return self.backend.encode(text)

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Returns the ids of a chat in the model's own template, up to where the assistant's next turn begins.

        Args:
          turns: pairs (role, content).

        Raises:
          ValueError: the template takes no such chat, or a content spells a special token, which the template would
            make one of.
        """
        ids = self.backend.encode_chat(turns)
        if beyond := [token for token in ids if token >= self.vocab_size]:
            raise ValueError(
                f"the model's chat template writes {self.backend.piece(beyond[0])!r}, and its embedding has no such row"
            )
        return ids

    def within(self, rows: int) -> "Tokenizer":
        """Returns this tokenizer for an embedding of so many rows, which may lack special tokens that were added later.

        Raises:
          ValueError: naming a token that the embedding lacks although a text, or every text, comes to have it.
        """
        if self.vocab_size <= rows:
            return self
        needed = [("a text", self.text_size - 1), ("the end of an answer", self.eos_id)]
        needed += [("the beginning of a text", self.bos_id)] if self.bos_id is not None and self.add_bos else []
        for what, token in needed:
            if token >= rows:
                raise ValueError(
                    f"the tokenizer has {self.vocab_size} ids, the model's embedding {rows} rows: {what} may become "
                    f"{self.backend.piece(token)!r}, id {token}. config.model.tokenizer must be the one that the model "
                    "was trained with."
                )
        pad = self.pad_id if self.pad_id < rows else self.eos_id
        return dataclasses.replace(self, vocab_size=rows, pad_id=pad)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids less special tokens and ids beyond the vocabulary; does not stop at eos."""
        return self.backend.decode([int(token) for token in ids])


class _WithoutChatTemplate:
    has_chat_template = False

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        raise ValueError("this tokenizer has no chat template")


class SentencePieceBackend(_WithoutChatTemplate):
    """A SentencePiece model."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor):
        self._model = model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        model = self._model
        plain = [i for i in ids if 0 <= i < len(model) and not (model.is_control(i) or model.is_unknown(i))]
        return model.decode(plain)

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(token)


class TransformersBackend:
    """A fast tokenizer of transformers."""

    def __init__(self, model: "PreTrainedTokenizerFast"):
        self._model = model
        self.has_chat_template = model.chat_template is not None

    def encode(self, text: str) -> list[int]:
        # Data must not be able to end a text or to start a chat turn by spelling a special token.
        return self._model(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        specials = [token.content for token in self._model.added_tokens_decoder.values() if token.special]
        for role, content in turns:
            if spelled := [token for token in specials if token in content]:
                raise ValueError(f"the {role}'s turn spells the special token {spelled[0]!r}: take it out of the chat")
        try:
            text = self._model.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                tokenize=False,
                add_generation_prompt=True,
                date_string=_TEMPLATE_DATE,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template takes no such chat: {error}") from error
        return self._model(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        return str(self._model.convert_ids_to_tokens(token))


class ByteBackend(_WithoutChatTemplate):
    """One id for each byte of UTF-8, after padding (0), end (1) and unknown (2): for models with random weights."""

    offset = 3

    def encode(self, text: str) -> list[int]:
        return [byte + self.offset for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - self.offset for i in ids if 0 <= i - self.offset < 256).decode(errors="replace")

    def piece(self, token: int) -> str:
        return f"byte {token - self.offset}"


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a model folder (tokenizer.json, tokenizer.model or spiece.model, in this order), one of these
        files, a .gguf file, an address for `resolve_path`, or "bytes". The special tokens of a folder come from
        tokenizer_config.json, special_tokens_map.json, the SentencePiece model, generation_config.json and
        config.json, in this order.

    Raises:
      FileNotFoundError: nothing is there, or the folder has no tokenizer.
      ValueError: a file is broken, no end token is known, or a GGUF's pre-tokenizer is not known here.
    """
    if path == "bytes":
        size = 256 + ByteBackend.offset
        return Tokenizer(size, 0, 1, None, False, 2, size, ByteBackend())
    location = resolve_path(path)
    if location.suffix == ".gguf":
        return _from_gguf(location)
    if location.is_dir():
        files = [location / name for name in FILES if (location / name).is_file()]
        if not files and _Settings(location, {}).get("tokenizer_class", "") == "ByT5Tokenizer":
            raise ValueError(
                f'{location} has ByT5\'s tokenizer, which needs no file: set config.model.tokenizer="bytes"'
            )
        if not files and (location / "vocab.json").is_file():
            raise FileNotFoundError(
                f"{location} has vocab.json, which does not say how text is split: write tokenizer.json beside it with "
                "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        if not files:
            raise FileNotFoundError(f"{location} has no tokenizer: looked for {', '.join(FILES)}")
        location = files[0]
    if location.suffix == ".model":
        return _from_sentencepiece(location)
    if location.suffix == ".json":
        return _from_json(location)
    raise ValueError(f"{location} is no tokenizer: give a model folder, a .model, a .json or a .gguf file")


def _from_sentencepiece(file: Path) -> Tokenizer:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load(str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} is not a valid SentencePiece model ({error}): fetch it anew") from error
    vocabulary = {model.id_to_piece(i): i for i in range(len(model))}
    settings = _Settings(file.parent, vocabulary)
    own = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    bos = settings.special("bos", own["bos"])
    # T5 has no bos at all; LLaMA's tokenizer.model has one, and the model wants it.
    add_bos = settings.get("add_bos_token", bos is not None)
    pad, eos = (settings.special(name, own[name]) for name in ("pad", "eos"))
    return _tokenizer(file, len(model), _Special(pad, eos, bos, add_bos, model.unk_id()), SentencePieceBackend(model))


def _fast_tokenizer() -> "type[PreTrainedTokenizerFast]":
    # Imported on use: it takes seconds. Without PyTorch it would warn that no model can be loaded, and none is to be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _from_json(file: Path) -> Tokenizer:
    try:
        stored = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"{file} is not a valid tokenizer.json ({error}): fetch it anew") from error
    vocabulary = stored.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ValueError(f"{file} has an empty vocabulary: fetch it anew")
    settings = _Settings(file.parent, vocabulary)
    bos, eos, pad = (settings.special(name) for name in ("bos", "eos", "pad"))
    # Not AutoTokenizer, which rebuilds LLaMA's and T5's from their vocabularies: texts that begin with a space then
    # lose it.
    model = _fast_tokenizer().from_pretrained(
        file.parent, tokenizer_file=str(file), local_files_only=True, **_names(stored, bos=bos, eos=eos, pad=pad)
    )
    add_bos = settings.get("add_bos_token", bos in model("a")["input_ids"])
    size = max(vocabulary.values()) + 1
    return _tokenizer(
        file, size, _Special(pad, eos, bos, add_bos, _unknown(stored), _text_size(stored)), TransformersBackend(model)
    )


def _unknown(model: tokenizers.Tokenizer) -> int | None:
    """The id of the unknown token of a vocabulary; a unigram model keeps the id alone."""
    stored = json.loads(model.to_str())["model"]
    token = stored.get("unk_token")
    return stored.get("unk_id") if token is None else model.token_to_id(token)


def _text_size(model: tokenizers.Tokenizer) -> int:
    """One more than the highest id that a text can become: special tokens are not made of text."""
    special = {number for number, token in model.get_added_tokens_decoder().items() if token.special}
    return 1 + max(set(model.get_vocab(with_added_tokens=True).values()) - special, default=-1)


def _names(model: tokenizers.Tokenizer, **ids: int | None) -> dict[str, str | None]:
    """What transformers is told of special tokens: those that the vocabulary has, for templates that write them.

    It would add any other that a folder names, and an unknown token that it cannot add sends it round in circles.
    """
    names = {f"{name}_token": None if i is None or i < 0 else model.id_to_token(i) for name, i in ids.items()}
    return {**names, "unk_token": None}


def _from_gguf(file: Path) -> Tokenizer:
    vocabulary = gguf_vocabulary.read(file)
    if isinstance(vocabulary.model, tokenizers.Tokenizer):
        names = _names(vocabulary.model, bos=vocabulary.bos_id, eos=vocabulary.eos_id, pad=vocabulary.pad_id)
        backend: Backend = TransformersBackend(
            _fast_tokenizer()(tokenizer_object=vocabulary.model, chat_template=vocabulary.chat_template, **names)
        )
    else:
        backend = SentencePieceBackend(vocabulary.model)
    fast = isinstance(vocabulary.model, tokenizers.Tokenizer)
    unknown, text = (None, _text_size(vocabulary.model)) if fast else (vocabulary.model.unk_id(), 0)
    special = _Special(vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id, vocabulary.add_bos, unknown, text)
    return _tokenizer(file, vocabulary.size, special, backend)


@dataclasses.dataclass(frozen=True)
class _Special:
    """The special tokens that a file names, and whether texts begin with bos."""

    pad: int | None
    eos: int | None
    bos: int | None
    add_bos: bool
    unk: int | None
    text_size: int = 0


def _tokenizer(file: Path, size: int, special: _Special, backend: Backend) -> Tokenizer:
    pad, eos, bos = special.pad, special.eos, special.bos
    if eos is None:
        raise ValueError(
            f"{file}: no end token is known. Name it as eos_token in tokenizer_config.json, "
            "or as eos_token_id in config.json"
        )
    # Some folders name a padding token that only transformers adds, beyond the vocabulary.
    pad = pad if pad is not None and 0 <= pad < size else eos
    for name, token in (("eos", eos), ("bos", bos)):
        if token is not None and not 0 <= token < size:
            raise ValueError(f"{file}: the {name} id {token} is outside the vocabulary of {size}")
    if special.add_bos and bos is None:
        raise ValueError(f"{file}: add_bos_token is set, but no bos token is known: name it in bos_token")
    return Tokenizer(size, pad, eos, bos, bool(special.add_bos), special.unk, special.text_size or size, backend)


class _Settings:
    """The JSON files beside a tokenizer."""

    def __init__(self, folder: Path, vocabulary: dict[str, int]):
        self._folder, self._vocabulary = folder, vocabulary
        self._config = self._read("tokenizer_config.json")

    def get(self, key: str, default: Any) -> Any:
        value = self._config.get(key)
        return default if value is None else value

    def special(self, name: str, own: int = -1) -> int | None:
        """Returns the id of a special token; `own` is what the tokenizer itself says, negative for none."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = self._read(file).get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{self._folder / file}: {name}_token must be a string, not {token!r:.60}")
            if token in self._vocabulary:
                return self._vocabulary[token]
            # The first release of LLaMA 1 names its tokens "".
            if token and own < 0 and name != "pad":
                raise ValueError(f"{self._folder / file}: {name}_token {token!r} is not in the vocabulary")
        if own >= 0:
            return own
        for file in ("generation_config.json", "config.json"):
            token = self._read(file).get(f"{name}_token_id")
            token = token[0] if isinstance(token, list) and token else token
            if token is not None and type(token) is not int:
                raise ValueError(f"{self._folder / file}: {name}_token_id must be a whole number, not {token!r:.60}")
            if token is not None and token >= 0:
                return token
        return None

    def _read(self, name: str) -> dict[str, Any]:
        file = self._folder / name
        return read_json(file) if file.is_file() else {}
