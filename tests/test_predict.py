"""The command that asks: every form of a line, faulty ones in between, an output that goes on, and the small prompt."""

import io
import json

import pytest

import sapt_jax
from sapt_jax import predict

pytestmark = pytest.mark.slow

LINES = [
    "abcd",
    '{"input": "dcba", "task": "mirror", "id": "b"}',
    '{"input": "broken"',
    "",
    '{"messages": [{"role": "user", "content": "abcd"}], "definition": "shout it.", "input": null}',
    '{"text": "abcd"}',
    '{"input": 3}',
    '{"input": "abc", "task": "nothing"}',
    "[1, 2]",
    '{"input": "ab\\ud800"}',
    '{"input": "ab", "definition": "\\udfff"}',
]


@pytest.fixture(scope="module")
def answered(asked_run, tmp_path_factory):
    """(input file, output file) of a command that went through to the end, with what it drew."""
    folder = tmp_path_factory.mktemp("predict")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_bytes("\n".join(LINES).encode() + b"\nabc\xff\nlast")
    assert run(asked_run, source, target) == 1
    return source, target


def run(workdir, source, target, *more):
    options = ["--temperature=1.0", "--seed=3", "--task=shout", *more]
    return predict.main([f"--run={workdir}", f"--input={source}", f"--output={target}", *options])


def rows_of(target):
    return {row["line"]: row for row in map(json.loads, target.read_text(encoding="utf-8").splitlines())}


def test_every_line_is_answered_or_named(answered, asked_run):
    rows = rows_of(answered[1])
    assert list(rows) == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    faults = {number: row["error"] for number, row in rows.items() if "error" in row}
    assert faults.keys() == {3, 6, 7, 8, 10, 11, 12}
    assert "malformed JSON" in faults[3] and 'either "input" or "messages"' in faults[6]
    assert "must be a text" in faults[7] and "'nothing'" in faults[8] and "byte 3 is not UTF-8" in faults[12]
    assert "the input is not Unicode" in faults[10] and "the definition is not Unicode" in faults[11]
    assert rows[10]["input"] == "ab\ud800"
    assert rows[2]["id"] == "b" and rows[9]["input"] == "[1, 2]"
    model = sapt_jax.load(asked_run)
    # What a line draws depends on its number alone: the first input of a call has number 0.
    first = model.row(predict.Question("abcd", "shout"), model.search(temperature=1.0, seed=3), 1)
    (answer,) = model.answer([first])
    assert rows[1]["prediction"] == answer.text
    assert rows[1]["attention"] == pytest.approx(answer.attention, abs=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_an_output_that_was_cut_off_goes_on(answered, asked_run, tmp_path, share):
    source, whole = answered
    target = tmp_path / "out.jsonl"
    target.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    run(asked_run, source, target)
    assert rows_of(target) == rows_of(whole)


def test_an_output_of_something_else_is_left_alone(answered, asked_run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    for text in ("something\n", '{"line": 1, "input": "other"}\n', "no line"):
        other.write_text(text)
        with pytest.raises(SystemExit):
            run(asked_run, answered[0], other)
        assert "holds something else than answers" in capsys.readouterr().err
        assert other.read_text() == text


def test_a_stream_is_answered_to_stdout(asked_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abcd\ndcba\n")))
    assert predict.main([f"--run={asked_run}", "--input=-"]) == 0
    shown = capsys.readouterr()
    answers = sapt_jax.load(asked_run).generate(["abcd", "dcba"])
    assert [json.loads(line)["prediction"] for line in shown.out.splitlines()] == [one.text for one in answers]
    assert "2 lines answered, 0 faulty" in shown.err


def test_a_prompt_to_try_things(asked_run, monkeypatch, capsys):
    typed = iter(["/task shout", "abcd", "/definition other", "abcd", "/plain", "abcd", "/tasks", "/what", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or _end())
    assert predict.main([f"--run={asked_run}", "--max_new_tokens=4"]) == 0
    shown = capsys.readouterr().out
    model = sapt_jax.load(asked_run)
    for instruction in ({"task": "shout"}, {"definition": "other"}, {}):
        assert model.generate(["abcd"], max_new_tokens=4, **instruction)[0].text in shown
    assert "mirror: mirror it." in shown and shown.count("/task NAME") == 2


def _end():
    raise EOFError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run=nowhere"], "nowhere has no config.json"),
        (["--task=nothing"], "--task=nothing: the run has shout, mirror, first"),
        (["--temperature=-1"], "temperature must be 0, or a number from"),
        (["--input=nowhere"], "nowhere"),
    ],
)
def test_a_bad_flag_is_named(asked_run, capsys, flags, message):
    with pytest.raises(SystemExit):
        predict.main([f"--run={asked_run}", *flags])
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
