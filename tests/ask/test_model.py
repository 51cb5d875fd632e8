"""A loaded run answers as the run itself did, alone or among others; learns more; and takes in what others commit."""

import shutil

import numpy as np
import pytest

import sapt_jax
from sapt_jax.ask.questions import Question
from tests.helpers.asked_runs import predicted
from tests.helpers.learned_runs import TASKS, make_run
from tests.helpers.tiny import ORDER

# The run that all of them ask takes its time.
pytestmark = pytest.mark.slow

INPUTS = ["abcd", "dcbaabcd", "a", "bb bb bb bb bb bb bb"]


@pytest.fixture(scope="module")
def model(asked_run):
    return sapt_jax.load(asked_run)


@pytest.mark.parametrize("task", ORDER)
def test_it_answers_as_the_run_did(model, asked_run, task):
    rows = predicted(asked_run, task)
    answers = model.generate([row["input"] for row in rows], task=task)
    assert [answer.text for answer in answers] == [row["prediction"] for row in rows]
    weights = np.array([row["attention_weights"] for row in rows])
    np.testing.assert_allclose([[*answer.attention.values()] for answer in answers], weights, atol=2e-6)
    np.testing.assert_allclose(model.attention([row["input"] for row in rows], task=task), weights, atol=2e-6)


def test_the_run_says_different_things(model):
    """Else the comparisons of this file would say nothing."""
    assert len({answer.text for answer in model.generate(INPUTS)}) > 2


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(model):
    together = model.generate(INPUTS, task="shout", max_new_tokens=5)
    for text, answer in zip(INPUTS, together, strict=True):
        (alone,) = model.generate([text], task="shout", max_new_tokens=5)
        assert (alone.text, alone.new_tokens) == (answer.text, answer.new_tokens)
    drawn = model.generate(INPUTS, temperature=1.3, seed=5)
    assert model.generate(INPUTS[:1], temperature=1.3, seed=5)[0].text == drawn[0].text
    assert [answer.text for answer in model.generate(INPUTS, temperature=1.3, seed=6)] != [
        answer.text for answer in drawn
    ]


def test_rows_of_one_call_keep_their_own_searches(model):
    """As a server asks: limits, tasks, temperatures and beams beside each other."""
    searches = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 8},
        {"beams": 2},
        {"temperature": 0.9, "top_p": 0.8, "seed": 1},
        {"temperature": 0.1, "seed": 2},
    ]
    questions = [Question("abcd", ORDER[number % 3]) for number in range(len(searches))]
    pairs = zip(questions, searches, strict=True)
    together = model.answer([model.row(question, model.search(**search), 0) for question, search in pairs])
    for question, search, answer in zip(questions, searches, together, strict=True):
        (alone,) = model.generate(["abcd"], task=question.task, **search)
        assert alone.text == answer.text and alone.new_tokens <= search.get("max_new_tokens", 8)


def test_a_shorter_limit_gives_the_beginning(model):
    longer = model.generate(INPUTS, max_new_tokens=8)
    for limit in (1, 3, 7):
        for short, long in zip(model.generate(INPUTS, max_new_tokens=limit), longer, strict=True):
            assert short.new_tokens == min(limit, long.new_tokens)
            assert long.text.startswith(short.text.rstrip("\N{REPLACEMENT CHARACTER}"))
            assert short.finished == (long.finished and long.new_tokens < limit)


def test_drawing_from_what_is_certain_is_greedy(model):
    greedy = [answer.text for answer in model.generate(INPUTS)]
    assert [answer.text for answer in model.generate(INPUTS, temperature=1.0, top_p=1e-6)] == greedy


def test_an_instruction_is_put_as_in_training(model):
    told = model.generate(["abcd"], task="mirror")
    assert model.instructions["mirror"] == "mirror it."
    assert model.generate(["abcd"], definition="mirror it.") == told
    assert model.generate(["abcd"])[0].prompt_tokens == told[0].prompt_tokens - len("mirror it.\n\n")
    assert model.generate(["abcd"], task="mirror", definition="") == model.generate(["abcd"])


def test_a_long_input_is_cut_and_told(model):
    short, long = model.generate(["ab", "ab" * 100])
    assert not short.cut and long.cut and long.prompt_tokens == 48


def test_a_chat_is_written_out_where_there_is_no_template(model):
    turns = [{"role": "user", "content": "hi"}, {"role": "user", "content": "abcd"}]
    assert model.generate([turns[1:], turns], task="shout") == model.generate(
        ["abcd", "user: hi\nuser: abcd"], task="shout"
    )


def test_without_a_task_the_others_share_its_attention(model):
    whole, less = model.attention(INPUTS), model.without("mirror")
    assert less.tasks == ("shout", "first") and model.tasks == ORDER
    kept = whole[:, [0, 2]]
    np.testing.assert_allclose(less.attention(INPUTS), kept / kept.sum(axis=1, keepdims=True), rtol=1e-4)
    assert less.generate(INPUTS[:1])[0].attention.keys() == {"shout", "first"}
    assert less.without("shout").tasks == ("first",)
    np.testing.assert_allclose(less.without("shout").attention(INPUTS), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="no task would be left"):
        less.without("shout", "first")


def test_a_task_that_others_commit_is_taken_in_without_compiling_anew(model, asked_copy):
    last = asked_copy / "tasks/02-first"
    away = shutil.move(last, asked_copy.parent / "away")
    early = sapt_jax.load(asked_copy)
    assert early.tasks == ("shout", "mirror") and not early.refresh()
    before = early.generate(INPUTS, task="shout")
    assert before[0].attention.keys() == {"shout", "mirror"}
    sizes = [program._cache_size() for program in early._backbone._programs.values()]
    shutil.move(away, last)
    assert early.generate(INPUTS, task="shout") == before
    assert early.refresh() and early.tasks == ORDER
    assert early.generate(INPUTS, task="shout") == model.generate(INPUTS, task="shout")
    assert [program._cache_size() for program in early._backbone._programs.values()] == sizes


def test_it_learns_one_more_task(asked_copy):
    model = sapt_jax.load(asked_copy)
    rows = [{"input": text, "output": text[-1]} for text in ("abc", "bcd", "cda", "dab", "acb", "bdc", "cba", "dcb")]
    with pytest.raises(ValueError, match="train row 1 has no 'output'"):
        model.learn("last", [rows[0], {"input": "a"}])
    assert not (asked_copy / "own_tasks").exists()
    before = model.generate(INPUTS, task="shout")
    scores = model.learn("last", rows, definition="last it.")
    assert model.tasks == (*ORDER, "last") and np.array(scores["matrix"]).shape == (4, 4)
    written = {file.name: file.read_text().splitlines() for file in (asked_copy / "own_tasks/last").iterdir()}
    assert len(written["train.jsonl"]) == 7 and len(written["test.jsonl"]) == 1
    assert model.instructions["last"] == "last it."
    after = model.generate(INPUTS, task="shout")
    assert len(after[0].attention) == 4 and len(before[0].attention) == 3
    with pytest.raises(ValueError, match="learned this task already"):
        model.learn("last", rows)
    moved = sapt_jax.load(shutil.move(asked_copy, asked_copy.with_name("moved")))
    assert moved.generate(INPUTS, task="last") == model.generate(INPUTS, task="last")


@pytest.mark.parametrize("family", ["llama of bytes", "t5 of bytes"])
@pytest.mark.parametrize(("method", "kind"), [("single_task", "lora"), ("prog_prompt", "prompt")])
def test_a_method_that_is_told_the_task_wants_it(tmp_path, family, method, kind):
    _, run = make_run(tmp_path, family, kind, **{"method": method, "model.tokenizer": "bytes"})
    model = sapt_jax.load(run)
    with pytest.raises(ValueError, match="give task, one of first, second, third"):
        model.generate(["abc"])
    rows = [model.row(Question("abc", task, ""), model.search(max_new_tokens=6), 0) for task in TASKS]
    together = model.answer(rows)
    for number, (task, answer) in enumerate(zip(TASKS, together, strict=True)):
        assert model.generate(["abc"], task=task, definition="", max_new_tokens=6)[0].text == answer.text
        own = np.eye(3)[number] if method == "single_task" else np.arange(3) <= number
        np.testing.assert_array_equal([*answer.attention.values()], own)


@pytest.mark.parametrize("family", ["llama of bytes", "t5 of bytes"])
def test_pytorch_gives_the_same_answers_from_what_is_exported(tmp_path, family):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    model = sapt_jax.load(make_run(tmp_path, family, "lora", **{"model.tokenizer": "bytes"})[1])
    model.without("second").to_torch(tmp_path / "exported")
    theirs = AutoModel.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    less = model.without("second")
    for text, answer in zip(INPUTS, less.generate(INPUTS, max_new_tokens=6), strict=True):
        ids = torch.tensor(less.row(Question(text), less.search(), 0)[0].ids)[None].long()
        tokens = theirs.generate(ids, torch.ones_like(ids), max_new_tokens=6).numpy()[0]
        # A decoder-only model repeats the input, another one begins with a token of its own.
        new = tokens[ids.shape[1] if "llama" in family else 1 :][: answer.new_tokens]
        assert model._backbone.tokenizer.decode(new).strip() == answer.text


def test_attention_needs_blocks_of_tasks(tmp_path):
    _, run = make_run(tmp_path, "llama of bytes", "lora", **{"method": "sequential", "model.tokenizer": "bytes"})
    model = sapt_jax.load(run)
    assert model.generate(["abc"], max_new_tokens=2)[0].attention == {}
    with pytest.raises(ValueError, match="'sequential' has no block for each task"):
        model.attention(["abc"])
    with pytest.raises(ValueError, match="share a block"):
        model.without("first")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("abc",), r"write \[text\]"),
        (([""],), "input 0: the input is empty"),
        ((["a", 3],), "input 1: the input must be a text or a list of chat messages, not 3"),
        ((["a", []],), "input 1: .*must be a text or a list"),
        (([[{"role": "user"}]],), "input 0.*content"),
        ((["a\ud800"],), "input 0: the input is not Unicode text: character 1"),
        ((["a"], "nothing"), "the run does not know the instruction of task 'nothing' .*it has shout, mirror, first"),
    ],
)
def test_a_bad_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(*arguments)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"beams": True}, "beams"),
        ({"temperature": -1.0}, "temperature must be 0, or a number from 0.001 to 1000, not -1.0"),
        ({"temperature": 10**400}, "temperature must be 0, or a number from 0.001 to 1000, not 1000"),
        ({"temperature": 1e-50}, "temperature must be 0, or a number from 0.001 to 1000, not 1e-50"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"beams": 193}, "beams must be at most 192"),
        ({"beams": 2, "temperature": 1.0}, "beams are not drawn"),
        ({"heat": 1.0}, "unexpected keyword argument 'heat'.*there are max_new_tokens"),
    ],
)
def test_a_bad_search_is_named(model, search, message):
    with pytest.raises(ValueError, match=message):
        model.generate(["a"], **search)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("../out", [{"input": "a", "output": "b"}] * 2), "slash"),
        (("a,b", [{"input": "a", "output": "b"}] * 2), "commas"),
        (("new", []), "train must be a list of rows"),
        (("new", "rows"), "train must be a list of rows"),
        (("new", [{"input": "a", "output": "b"}]), "train has one row"),
        (("new", [{"input": "a", "output": "b"}] * 2, None), "definition must be a text"),
        (("new", [{"input": "a", "output": "b"}] * 2, "", [{"input": "", "output": "b"}]), "test row 0 has an empty"),
        (("shout", [{"input": "a", "output": "b"}] * 2), "learned this task already"),
    ],
)
def test_a_bad_task_is_named_and_nothing_is_written(model, asked_run, arguments, message):
    before = sorted(asked_run.rglob("*"))
    with pytest.raises(ValueError, match=message):
        model.learn(*arguments)
    assert sorted(asked_run.rglob("*")) == before


def test_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        sapt_jax.load(tmp_path)


def test_asking_writes_nothing(model, asked_run):
    before = {file: file.stat().st_mtime_ns for file in asked_run.rglob("*")}
    again = sapt_jax.load(asked_run)
    again.generate(["abc"], task="shout", max_new_tokens=2)
    again.refresh()
    assert {file: file.stat().st_mtime_ns for file in asked_run.rglob("*")} == before
