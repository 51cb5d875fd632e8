"""Encoding a split: rows stay rows, cuts are counted, errors name the instance."""

import dataclasses
import json

import numpy as np
import pytest

from sapt_jax.data.encoding import EncodedSplit, Ragged, encode_split
from sapt_jax.data.prompts import encode_answer, encode_prompt, make_prompt
from sapt_jax.data.task import Instance
from sapt_jax.pretrained.tokenizer import load_tokenizer
from tests.helpers.data_fakes import WordTokenizer, random_task, rules
from tests.helpers.tiny_tokenizers import CHAT_TEMPLATE, PRE_TOKENIZERS, train_bpe


@pytest.mark.parametrize("trial", range(4))
def test_ragged_gives_back_its_rows(trial):
    rng = np.random.default_rng([31, trial])
    rows = [rng.integers(0, 99, rng.integers(0, 6)).tolist() for _ in range(rng.integers(0, 9))]
    ragged = Ragged.from_rows(rows)
    assert len(ragged) == len(rows)
    assert [ragged[i].tolist() for i in range(len(rows))] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.ids.dtype == np.int32
    with pytest.raises(IndexError):
        ragged[len(rows)]


def test_rows_taken_from_a_split_keep_their_answers():
    split = EncodedSplit(Ragged.from_rows([[1], [2, 3], [], [4]]), Ragged.from_rows([[5, 6], [7], [8], []]), 2, 1)
    taken = split.take(np.array([3, 1]))
    assert [(taken.sources[i].tolist(), taken.targets[i].tolist()) for i in range(2)] == [([4], []), ([2, 3], [7])]
    assert len(taken) == 2 and (taken.truncated_sources, taken.truncated_targets) == (2, 1)


@pytest.mark.parametrize("limits", [(30, 4), (200, 20)])
def test_rows_and_counts_match_encoding_one_by_one(limits):
    rng = np.random.default_rng(32)
    tokenizer = WordTokenizer()
    task = random_task(rng, "t")
    own = rules(max_source_length=limits[0], max_target_length=limits[1])
    split = encode_split(task.train, definition=task.definition, template="superni", tokenizer=tokenizer, rules=own)
    sources = [encode_prompt(make_prompt("superni", task.definition, i.input), tokenizer, own) for i in task.train]
    targets = [encode_answer(i.outputs[0], tokenizer, own) for i in task.train]
    assert len(split) == len(task.train)
    for row in range(len(split)):
        assert split.sources[row].tolist() == sources[row][0]
        assert split.targets[row].tolist() == targets[row][0]
    assert split.truncated_sources == sum(cut for _, cut in sources)
    assert split.truncated_targets == sum(cut for _, cut in targets)
    assert (split.truncated_sources > 0) == (limits[0] == 30)
    np.testing.assert_array_equal(split.lengths[:, 0], [len(source) for source, _ in sources])
    np.testing.assert_array_equal(split.lengths[:, 1], [len(target) for target, _ in targets])


def chat_tokenizer(folder, template=CHAT_TEMPLATE):
    train_bpe(PRE_TOKENIZERS["gpt-2"]).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


CHAT = Instance("c", "lines", ("12",), (("system", "Be kind."), ("user", "Hi")))


def encode_one(instance, tokenizer, **options):
    split = encode_split([instance], definition=" Do. ", template="plain", tokenizer=tokenizer, rules=rules(**options))
    return split.sources[0].tolist()


@pytest.mark.parametrize("family", ["decoder_only", "encoder_decoder"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_chat_takes_the_models_template_and_one_beginning_token(tmp_path, family, add_bos):
    tokenizer = chat_tokenizer(tmp_path)
    ids = encode_one(CHAT, tokenizer, max_source_length=200, family=family, add_bos=add_bos)
    want = tokenizer.encode_chat((("system", "Be kind."), ("user", "Do.\n\nHi")))
    assert want[0] == tokenizer.bos_id
    assert ids == want + [tokenizer.eos_id] * (family == "encoder_decoder")
    without = chat_tokenizer(tmp_path, CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    ids = encode_one(CHAT, without, max_source_length=200, family="decoder_only", add_bos=add_bos)
    assert ids.count(tokenizer.bos_id) == int(add_bos)


def test_other_inputs_and_tokenizers_keep_the_plain_prompt(tmp_path):
    plain = dataclasses.replace(CHAT, chat=())
    options = dict(max_source_length=200, family="encoder_decoder")
    for tokenizer, instance in ((chat_tokenizer(tmp_path), plain), (load_tokenizer("bytes"), CHAT)):
        ids = encode_one(instance, tokenizer, **options)
        assert ids == tokenizer.encode("Do.\n\nlines\nOutput: ") + [tokenizer.eos_id]


def test_a_long_chat_keeps_both_its_ends(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    long = dataclasses.replace(CHAT, chat=(("user", "word " * 50),))
    whole = encode_one(long, tokenizer, max_source_length=2000)
    ids = encode_one(long, tokenizer, max_source_length=41)
    assert len(ids) == 41 and ids[:21] == whole[:21] and ids[21:] == whole[-20:]
    assert tokenizer.decode(ids).endswith("assistant\n")


def test_errors_name_the_instance():
    task = random_task(np.random.default_rng(33), "t")
    with pytest.raises(ValueError, match=r"instance t-train-\d+: an answer of \d+ tokens"):
        encode_split(
            task.train,
            definition="",
            template="plain",
            tokenizer=WordTokenizer(),
            rules=rules(max_target_length=2, on_long_target="error"),
        )
