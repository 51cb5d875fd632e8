"""Passages of a text that no task is about: cut by hand, and what is wrong with a text is named."""

import pytest

from sapt_jax.data.general import cut_passages, load_general
from tests.helpers.data_fakes import WordTokenizer, rules


def passages(text, **changes):
    tokenizer = WordTokenizer()
    return tokenizer, cut_passages(text, tokenizer, rules(**changes))


def rows(ragged):
    return [row.tolist() for row in map(ragged.__getitem__, range(len(ragged)))]


TEXT = " ".join(f"w{n}" for n in range(9))


def test_a_decoders_passages_follow_one_another():
    tokenizer, split = passages(TEXT, family="decoder_only", add_bos=True, max_source_length=5, max_target_length=3)
    ids = tokenizer.encode(TEXT)
    assert rows(split.sources) == [[tokenizer.bos_id, *ids[0:4]], [tokenizer.bos_id, *ids[7:11]]]
    assert rows(split.targets) == [ids[4:7], ids[11:14]]
    # What is left is less than a passage.
    assert len(ids) == 17


def test_an_encoder_reads_an_end_token_and_no_beginning():
    tokenizer, split = passages(TEXT, family="encoder_decoder", max_source_length=10, max_target_length=8)
    ids = tokenizer.encode(TEXT)
    assert rows(split.sources) == [[*ids[0:9], tokenizer.eos_id]] and rows(split.targets) == [ids[9:17]]


def test_a_text_too_short_is_named():
    with pytest.raises(ValueError, match="a text of 17 tokens, but .* make passages of 18"):
        passages(TEXT, family="decoder_only", add_bos=False, max_source_length=10, max_target_length=8)


def test_the_text_is_a_file(tmp_path):
    file, given = tmp_path / "text.txt", rules(family="decoder_only", max_source_length=5, max_target_length=3)
    file.write_text(TEXT)
    assert len(load_general(str(file), "", WordTokenizer(), given)) == 2
    assert load_general("", "", WordTokenizer(), given) is None
    with pytest.raises(FileNotFoundError, match="config.eval.general='absent.txt': no such file. Name a text file"):
        load_general("absent.txt", "", WordTokenizer(), given)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="text.txt: byte 3 is not UTF-8"):
        load_general(str(file), "", WordTokenizer(), given)
