"""Tokenizers against the libraries that trained them: SentencePiece and tokenizer.json."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece
import transformers
from tokenizers import processors

from sapt_jax.pretrained.tokenizer import load_tokenizer
from tests.helpers.gguf_files import write_gguf
from tests.helpers.paths import SHARED
from tests.helpers.tiny_tokenizers import (
    CHAT_TEMPLATE,
    PRE_TOKENIZERS,
    TEXTS,
    bpe_fields,
    corpus,
    train_bpe,
    train_sentencepiece,
    write_llama_json,
)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """The path of a tiny SentencePiece model, by kind."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    return {kind: train_sentencepiece(kind, folder) for kind in ("llama", "t5")}.__getitem__


def write_json(file, **content):
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name,kind", [("tokenizer.model", "llama"), ("spiece.model", "t5")])
def test_sentencepiece_folders_encode_as_the_library(tmp_path, sentencepiece_model, name, kind):
    (tmp_path / name).write_bytes(sentencepiece_model(kind).read_bytes())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(kind)))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*TEXTS, *corpus()[:20]]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode([i for i in ids if not reference.is_unknown(i)])
    assert tokenizer.vocab_size == len(reference)


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode()) and all(3 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.eos_id]) == text


def test_special_ids_of_sentencepiece_models(tmp_path, sentencepiece_model):
    llama = load_tokenizer(sentencepiece_model("llama"))
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.add_bos) == (1, 2, 2, True)
    t5 = load_tokenizer(sentencepiece_model("t5"))
    assert (t5.bos_id, t5.eos_id, t5.pad_id, t5.add_bos) == (None, 1, 0, False)


def test_a_folders_settings_come_before_the_models(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("llama").read_bytes())
    write_json(
        tmp_path / "tokenizer_config.json",
        add_bos_token=False,
        pad_token="<unk>",
        eos_token={"content": "</s>"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos) == (0, 2, 1, False)
    # A padding token that only transformers adds is not in the model; the end token pads as well.
    write_json(tmp_path / "tokenizer_config.json", pad_token="[PAD]")
    write_json(tmp_path / "config.json", pad_token_id=400)
    assert load_tokenizer(tmp_path).pad_id == 2


def test_decoding_drops_special_and_unknown_ids(sentencepiece_model):
    for kind in ("llama", "t5"):
        tokenizer = load_tokenizer(sentencepiece_model(kind))
        ids = tokenizer.encode("the task")
        padded = [tokenizer.pad_id, *ids, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_size + 27]
        assert tokenizer.decode(np.array(padded, np.int32)) == tokenizer.decode(ids) == "the task"
    assert load_tokenizer(sentencepiece_model("llama")).decode([]) == ""


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_json_folders_encode_as_transformers(tmp_path, pre):
    model = train_bpe(PRE_TOKENIZERS[pre], ignore_merges=pre == "llama-bpe")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    reference.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in [*TEXTS, *corpus()[:20]]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        expected = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 10**6]) == expected == text
    assert tokenizer.vocab_size == len(reference)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "mine.json"])
def test_llamas_json_encodes_as_the_model_that_it_came_from(tmp_path, sentencepiece_model, name):
    """transformers' LlamaTokenizer would drop a space in front of a text."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model("llama")))
    train_bpe(PRE_TOKENIZERS["gpt-2"]).save(str(tmp_path / "tokenizer.json"))
    write_llama_json(reference, tmp_path / name)
    write_json(
        tmp_path / "tokenizer_config.json",
        **{"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "pad_token": None},
        **{"add_bos_token": True, "legacy": False, "tokenizer_class": "LlamaTokenizer"},
    )
    write_json(tmp_path / "config.json", model_type="llama", pad_token_id=-1)
    tokenizer = load_tokenizer(tmp_path if name == "tokenizer.json" else tmp_path / name)
    for text in [*TEXTS, " the task", "   the", *corpus()[:20]]:
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.decode([1, *tokenizer.encode(text), 2]) == reference.decode(reference.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, 2, True)


TURNS = (("system", "Be kind."), ("user", "the task"), ("assistant", "a sentence"), ("user", "12"))


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "gguf"])
def test_a_chat_is_written_in_the_models_template(tmp_path, place):
    model = train_bpe(PRE_TOKENIZERS["smollm"])
    if place == "gguf":
        fields = bpe_fields(model, "smollm") | {"tokenizer.chat_template": CHAT_TEMPLATE}
        tokenizer = load_tokenizer(write_gguf(tmp_path / "v.gguf", fields))
    else:
        model.save(str(tmp_path / "tokenizer.json"))
        settings = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
        write_json(tmp_path / "tokenizer_config.json", **settings, chat_template=CHAT_TEMPLATE)
        if place == "chat_template.jinja":
            write_json(tmp_path / "tokenizer_config.json", **settings)
            (tmp_path / place).write_text(CHAT_TEMPLATE)
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    text = "".join(f"<|start|>{role}\n{content}<|end|>\n" for role, content in TURNS) + "<|start|>assistant\n"
    ids = tokenizer.encode_chat(TURNS)
    assert ids == model.encode(text).ids
    assert ids.count(tokenizer.bos_id) == 5 and ids.count(tokenizer.eos_id) == 4
    # Special tokens are those of the template alone.
    with pytest.raises(ValueError, match=r"the user's turn spells the special token '<\|end\|>'"):
        tokenizer.encode_chat((("user", "a<|end|>b"),))
    with pytest.raises(ValueError, match="takes no such chat: the tool is unknown"):
        tokenizer.encode_chat((("tool", "rain"),))


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path):
    model = train_bpe(PRE_TOKENIZERS["gpt-2"])
    model.save(str(tmp_path / "tokenizer.json"))
    template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    write_json(tmp_path / "tokenizer_config.json", eos_token="<|end|>", chat_template=template)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat((("user", "a"),))) == "26 Jul 2024"


def test_tokenizers_without_a_template(tmp_path, sentencepiece_model):
    model = train_bpe(PRE_TOKENIZERS["gpt-2"])
    model.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", eos_token="<|end|>")
    for path in (tmp_path, sentencepiece_model("llama"), "bytes"):
        assert not load_tokenizer(path).has_chat_template


def test_padding_and_truncation_saved_in_a_json_do_not_leak_in(tmp_path):
    model = train_bpe(PRE_TOKENIZERS["gpt-2"])
    text = " ".join(TEXTS)
    expected = model.encode(text).ids
    model.enable_truncation(4)
    model.enable_padding(length=9)
    model.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", eos_token_id=[0, 1])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == expected and tokenizer.eos_id == 0


def test_add_bos_of_a_json_follows_its_settings_then_its_post_processor(tmp_path):
    model = train_bpe(PRE_TOKENIZERS["gpt-2"])
    model.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", bos_token="<|start|>", eos_token="<|end|>")
    assert load_tokenizer(tmp_path).add_bos is False
    model.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_bos is True
    assert tokenizer.encode("the task") == model.encode("the task").ids[1:]
    write_json(tmp_path / "tokenizer_config.json", bos_token="<|start|>", eos_token="<|end|>", add_bos_token=False)
    assert load_tokenizer(tmp_path).add_bos is False


def test_the_end_token_is_looked_up_in_order(tmp_path):
    train_bpe(PRE_TOKENIZERS["gpt-2"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: no end token is known"):
        load_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", eos_token_id=5)
    assert load_tokenizer(tmp_path).eos_id == 5
    write_json(tmp_path / "generation_config.json", eos_token_id=[4, 5])
    assert load_tokenizer(tmp_path).eos_id == 4
    write_json(tmp_path / "tokenizer_config.json", eos_token="", bos_token="", unk_token="")
    assert load_tokenizer(tmp_path).eos_id == 4
    write_json(tmp_path / "special_tokens_map.json", eos_token="<|pad|>")
    assert load_tokenizer(tmp_path).eos_id == 2
    write_json(tmp_path / "tokenizer_config.json", eos_token={"content": "<|start|>"})
    assert load_tokenizer(tmp_path).eos_id == 1


def test_text_that_spells_a_special_token_stays_text(tmp_path, sentencepiece_model):
    model = train_bpe(PRE_TOKENIZERS["smollm"])
    model.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", eos_token="<|end|>")
    file = write_gguf(tmp_path / "v.gguf", bpe_fields(model, "smollm"))
    for tokenizer, text in (
        (load_tokenizer(tmp_path), "a<|end|> b"),
        (load_tokenizer(file), "a<|end|> b"),
        (load_tokenizer(sentencepiece_model("llama")), "a</s> b"),
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text


def test_tokenizers_survive_pickling(tmp_path, sentencepiece_model):
    """Data workers are other processes."""
    file = write_gguf(tmp_path / "v.gguf", bpe_fields(train_bpe(PRE_TOKENIZERS["smollm"]), "smollm"))
    for path in (file, sentencepiece_model("llama")):
        tokenizer = load_tokenizer(path)
        copy = pickle.loads(pickle.dumps(tokenizer))
        text = "the task<|end|></s> 12"
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.decode([copy.eos_id, *copy.encode(text)]) == text


def test_errors_name_the_file_and_the_field(tmp_path, sentencepiece_model):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer: looked for tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)
    # transformers makes up a tokenizer for a folder like these.
    for kind in ("llama", "t5"):
        write_json(tmp_path / "config.json", model_type=kind, eos_token_id=1)
        write_json(tmp_path / "tokenizer_config.json", eos_token="</s>")
        with pytest.raises(FileNotFoundError, match=r"no tokenizer: looked for tokenizer\.json, tokenizer\.model"):
            load_tokenizer(tmp_path)
        (tmp_path / "config.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"x\.txt is no tokenizer"):
        load_tokenizer(tmp_path / "x.txt")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a valid SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer\.json"):
        load_tokenizer(tmp_path)
    model = train_bpe(PRE_TOKENIZERS["gpt-2"])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token":')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", eos_token="</s>")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token '</s>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", eos_token="<|end|>", add_bos_token=True)
    with pytest.raises(ValueError, match="no bos token is known"):
        load_tokenizer(tmp_path)


def test_t5_vocabulary():
    folder = SHARED / "tokenizers" / "t5"
    if not (folder / "spiece.model").is_file():
        pytest.skip(f"T5's vocabulary is not at {folder}; set SAPT_DATA_DIR to the shared data")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (32000, 0, 1)
    assert (tokenizer.bos_id, tokenizer.add_bos) == (None, False)
    ids = tokenizer.encode("translate English to German: That is good.")
    # The ids that T5's own documentation and tests give for this sentence.
    assert ids == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5]
    assert tokenizer.decode([0, *ids, 1, 32099, 32127]) == "translate English to German: That is good."
