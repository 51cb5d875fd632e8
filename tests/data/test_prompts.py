"""Prompts and truncation: the templates to the letter, and what a cut keeps."""

import numpy as np
import pytest

from sapt_jax.data.prompts import TEMPLATES, choose_reference, encode_answer, encode_prompt, make_prompt
from sapt_jax.data.task import Instance
from tests.helpers.data_fakes import WordTokenizer, rules

NAMES = ("superni", "long_sequence", "plain")


def test_templates_are_the_papers():
    assert TEMPLATES.keys() == set(NAMES)
    assert "".join(make_prompt("superni", " Say it. \n", " in\n")) == (
        "Definition: Say it.\n\nNow complete the following example -\nInput:  in\n\nOutput: "
    )
    assert "".join(make_prompt("long_sequence", " Say it.\n", "in ")) == "Say it.\nin \nOutput: "
    assert "".join(make_prompt("long_sequence", "", "in")) == "in\nOutput: "
    assert "".join(make_prompt("plain", "Say it.", "{in}")) == "Say it.\n\n{in}\nOutput: "
    with pytest.raises(ValueError, match="unknown prompt template 'other'; there are superni"):
        make_prompt("other", "", "")


@pytest.mark.parametrize("family", ["decoder_only", "encoder_decoder"])
@pytest.mark.parametrize("template", NAMES)
@pytest.mark.parametrize("trial", range(4))
def test_middle_truncation_keeps_head_and_tail_and_both_ends_of_the_input(family, template, trial):
    rng = np.random.default_rng([21, trial])
    tokenizer = WordTokenizer()
    text = " ".join(f"w{i}" for i in range(rng.integers(1, 90)))
    prompt = make_prompt(template, "Be brief and kind .", text)
    limit = int(rng.integers(40, 120))
    ids, cut = encode_prompt(prompt, tokenizer, rules(family=family, max_source_length=limit))
    whole = tokenizer.encode("".join(prompt))
    special = 1
    assert len(ids) == min(len(whole) + special, limit)
    assert cut == (len(whole) + special > limit)
    if family == "decoder_only":
        assert ids[0] == tokenizer.bos_id
        body = ids[1:]
    else:
        assert ids[-1] == tokenizer.eos_id
        body = ids[:-1]
    kept = tokenizer.decode(body)
    assert kept.startswith(prompt.head) and kept.endswith(prompt.tail)
    if not cut:
        assert kept == "".join(prompt)
    else:
        # As ids: where the cut is, two words of the text touch.
        middle = body[len(tokenizer.encode(prompt.head)) : len(body) - len(tokenizer.encode(prompt.tail))]
        source = tokenizer.encode(prompt.input)
        half = len(middle) // 2
        assert middle == source[: len(middle) - half] + source[len(source) - half :]


def test_end_truncation_loses_the_end_as_the_papers_code():
    tokenizer = WordTokenizer()
    prompt = make_prompt("superni", "Be brief .", "a b c d e f g h")
    whole = tokenizer.encode("".join(prompt))
    ids, cut = encode_prompt(prompt, tokenizer, rules(family="encoder_decoder", max_source_length=20, truncation="end"))
    assert cut and ids == whole[:19] + [tokenizer.eos_id]
    ids, cut = encode_prompt(prompt, tokenizer, rules(add_bos=False, max_source_length=20, truncation="end"))
    assert cut and ids == whole[:20]


def test_a_definition_over_the_limit_loses_its_end_but_never_the_output_line():
    tokenizer = WordTokenizer()
    prompt = make_prompt("plain", " ".join("abcdefghijklmnop"), "the input")
    ids, cut = encode_prompt(prompt, tokenizer, rules(max_source_length=12))
    assert cut and len(ids) == 12
    assert tokenizer.decode(ids).startswith("a b c d") and tokenizer.decode(ids).endswith("\nOutput: ")
    with pytest.raises(ValueError, match="max_source_length leaves 1 tokens, fewer than the 3"):
        encode_prompt(prompt, tokenizer, rules(max_source_length=2))


def test_bos_follows_the_rules_and_needs_a_token():
    tokenizer = WordTokenizer()
    prompt = make_prompt("plain", "", "a")
    with_bos, _ = encode_prompt(prompt, tokenizer, rules(add_bos=True))
    without, _ = encode_prompt(prompt, tokenizer, rules(add_bos=False))
    assert with_bos == [tokenizer.bos_id, *without]
    encoder, _ = encode_prompt(prompt, tokenizer, rules(add_bos=True, family="encoder_decoder"))
    assert encoder == [*without, tokenizer.eos_id]
    tokenizer.bos_id = None
    with pytest.raises(ValueError, match="add_bos"):
        encode_prompt(prompt, tokenizer, rules(add_bos=True))


@pytest.mark.parametrize("length", range(1, 9))
def test_answers_end_with_the_end_token_within_the_limit(length):
    tokenizer = WordTokenizer()
    answer = "x" + " " * (length - 1)
    for limit in (4, 5):
        ids, cut = encode_answer(answer, tokenizer, rules(max_target_length=limit))
        assert cut == (length + 1 > limit)
        assert ids == tokenizer.encode(answer)[: limit - 1] + [tokenizer.eos_id]
        ids, cut = encode_answer(answer, tokenizer, rules(max_target_length=limit, target_keeps_end=False))
        assert ids == (tokenizer.encode(answer) + [tokenizer.eos_id])[:limit]
        if cut:
            with pytest.raises(ValueError, match=f"max_target_length={limit}"):
                encode_answer(answer, tokenizer, rules(max_target_length=limit, on_long_target="error"))


def test_a_random_reference_is_a_pure_function_of_seed_and_instance():
    instances = [Instance(f"i{i}", "x", ("a", "b", "c")) for i in range(60)]
    draws = [[choose_reference(instance, "random", seed) for instance in instances] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) == {"a", "b", "c"}
    assert {choose_reference(instance, "first", 0) for instance in instances} == {"a"}


@pytest.mark.parametrize(
    "field, value",
    [("family", "rnn"), ("truncation", "start"), ("references", "best"), ("on_long_target", "skip")],
)
def test_bad_rules_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"config.data.{field}=.* must be one of"):
        rules(**{field: value})
    with pytest.raises(ValueError, match="config.data.max_target_length=1 must be at least 2"):
        rules(max_target_length=1)
