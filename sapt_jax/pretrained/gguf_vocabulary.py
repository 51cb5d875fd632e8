"""Rebuilds a tokenizer from the vocabulary inside a GGUF file."""

import dataclasses
import logging
from pathlib import Path

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sapt_jax.pretrained.gguf_files import Metadata

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the splits before byte-level BPE, one after another (llama.cpp, src/llama-vocab.cpp).
_SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
}
_SPLITS |= {"gpt2": _SPLITS["gpt-2"], "llama3": _SPLITS["llama-bpe"], "llama-v3": _SPLITS["llama-bpe"]}
# How LLaMA 3's own vocabulary is known.
_LLAMA3_SIZE, _LLAMA3_BOS = 128256, (128000, "<|begin_of_text|>")
# Families that merge only what is not a token already, and want a bos unless told otherwise.
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer from a GGUF file, its special ids and chat template (None where the file names none)."""

    model: Tokenizer | sentencepiece.SentencePieceProcessor
    size: int
    pad_id: int | None
    eos_id: int | None
    bos_id: int | None
    add_bos: bool
    chat_template: str | None


def read(file: Path) -> Vocabulary:
    """Reads the vocabulary of a GGUF file.

    Raises:
      ValueError: the file has none, or one of a kind that cannot be rebuilt here.
    """
    metadata = Metadata(file)
    kind = metadata.need("tokenizer.ggml.model")
    tokens = metadata.need("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{file}: tokenizer.ggml.tokens is no list of texts: convert the model again with llama.cpp")
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = _without_pre(file, tokens) if kind == "gpt2" else "default"
    if kind == "gpt2":
        model: Tokenizer | sentencepiece.SentencePieceProcessor = _byte_level_bpe(metadata, pre)
        wants_bos = pre in _LLAMA3_NAMES
    elif kind == "llama":
        model, wants_bos = _sentencepiece(metadata), True
    else:
        raise ValueError(f"{file}: tokenizer.ggml.model = {kind!r}; only 'gpt2' and 'llama' can be rebuilt")
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("padding", "eos", "bos")}
    return Vocabulary(
        model=model,
        size=len(tokens),
        pad_id=ids["padding"],
        eos_id=ids["eos"],
        bos_id=ids["bos"],
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", wants_bos and ids["bos"] is not None),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _without_pre(file: Path, tokens: list[str]) -> str:
    """The pre-tokenizer of a file that names none, as llama.cpp's converter wrote them until spring 2024."""
    if len(tokens) == _LLAMA3_SIZE and tokens[_LLAMA3_BOS[0]] == _LLAMA3_BOS[1]:
        return "llama-bpe"
    logging.getLogger(__name__).warning(
        "%s has no metadata field tokenizer.ggml.pre: texts are split as llama.cpp does without it, which may not be "
        "as the model was trained. Convert the model again, or set config.model.tokenizer to the folder that it was "
        "made from.",
        file,
    )
    return "default"


def _byte_level_bpe(metadata: Metadata, pre: str) -> Tokenizer:
    if pre not in _SPLITS:
        raise ValueError(
            f"{metadata.file}: tokenizer.ggml.pre = {pre!r} is not known here (known: {', '.join(_SPLITS)}). "
            "Give the tokenizer of the Hugging Face folder that the file was made from."
        )
    tokens = metadata.need("tokenizer.ggml.tokens")
    merges = []
    for merge in metadata.need("tokenizer.ggml.merges"):
        middle = merge.index(" ", 1)
        merges.append((merge[:middle], merge[middle + 1 :]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3_NAMES))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == gguf.TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == gguf.TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def _sentencepiece(metadata: Metadata) -> sentencepiece.SentencePieceProcessor:
    """Rebuilds LLaMA's SentencePiece BPE. Its normaliser only puts a space in front, and keeps all others."""
    tokens = metadata.need("tokenizer.ggml.tokens")
    scores = metadata.need("tokenizer.ggml.scores")
    kinds = metadata.need("tokenizer.ggml.token_type")
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        # GGUF's token types are SentencePiece's, by number.
        model.pieces.add(piece=token, score=score, type=int(kind))
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = gguf.TokenType.BYTE in kinds
    trainer.pad_id = -1
    for name in ("unknown", "bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            field = "unk" if name == "unknown" else name
            setattr(trainer, f"{field}_id", token)
            setattr(trainer, f"{field}_piece", tokens[token])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
