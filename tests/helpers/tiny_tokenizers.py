"""Trains tiny tokenizers for tests."""

import json

import gguf
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "Definition: In this task, you're given a sentence. Output: ",
    "  two spaces,  then\ttabs\n\nand lines  ",
    "It's 1234567 o'clock; we'll pay $3.50 <= 50% ^_^",
    "Überraschung! 你好, мир … naïve café 🙂",
    "",
    " ",
    "don't WON'T I'm they'll",
]


def corpus():
    """Words and numbers, the same in every run."""
    rng = np.random.default_rng(0)
    words = "task the input of a sentence you are given positive negative output don't it's Über café $ % 12 345"
    return [" ".join(rng.choice(words.split(), 12)) + "." for _ in range(300)]


def train_sentencepiece(kind, folder):
    """Trains a tiny SentencePiece model of LLaMA's kind (BPE, byte fallback, identity) or T5's (unigram)."""
    options = {
        "llama": {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "vocab_size": 400,
            "split_digits": True,
        },
        "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 50},
    }[kind]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(folder / kind), minloglevel=2, num_threads=1, **options
    )
    return folder / f"{kind}.model"


def train_bpe(split, ignore_merges=False, specials=("<|end|>", "<|start|>", "<|pad|>")):
    """Trains a tiny byte-level BPE."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    model.pre_tokenizer = split
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(corpus(), trainer)
    return model


def byte_level(*before, use_regex):
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def isolated(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


# Each as the model's own tokenizer.json on the Hub has it, next to the name that llama.cpp gave it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": byte_level(use_regex=True),
    "smollm": byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": byte_level(isolated(LLAMA3), use_regex=False),
}


# A chat template of the usual form, which refuses a role.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('the tool is unknown') }}{% endif %}"
    "{{ bos_token }}{{ message.role }}\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)


def write_llama_json(model, file):
    """Writes a SentencePiece BPE as the tokenizer.json that LLaMA 1 and 2 were published with."""
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    plain = {piece for piece, i in ids.items() if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))}
    merges = [
        (ids[piece], piece[:cut], piece[cut:])
        for piece in plain
        for cut in range(1, len(piece))
        if {piece[:cut], piece[cut:]} <= plain
    ]
    ordered = [(left, right) for _, left, right in sorted(merges)]
    fast = tokenizers.Tokenizer(models.BPE(ids, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ("<unk>", "<s>", "</s>")
    fast.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in specials])
    fast.save(str(file))


def bpe_fields(model, pre, **more):
    """The metadata that llama.cpp's converter writes for a byte-level BPE."""
    content = json.loads(model.to_str())
    vocabulary = model.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in content["added_tokens"]}
    kinds = [int(gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL) for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    fields |= {"eos_token_id": 0, "bos_token_id": 1}
    return under(fields | more)


def under(fields):
    """Puts GGUF fields under the tokenizer's prefix."""
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
