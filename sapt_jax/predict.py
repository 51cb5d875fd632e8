"""Asks a finished run: a file of inputs, a stream of them, or one after another in a terminal.

    python -m sapt_jax.predict --run=runs/mine --task=shout                     # a prompt to try things
    python -m sapt_jax.predict --run=runs/mine --input=rows.jsonl --output=answers.jsonl
    zcat texts.gz | python -m sapt_jax.predict --run=runs/mine --input=- > answers.jsonl

An input line is a text, or an object {"input": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}; "id",
"task" and "definition" may stand beside it. An output line is {"line": N, "input": ..., "prediction": ..., "attention":
{TASK: WEIGHT, ...}, ...} or, where a line cannot be answered, {"line": N, "error": ...}, and the exit status is then 1.
The same command goes on with an output that was cut off.
"""

import argparse
import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sapt_jax.ask.answers import Answer, Search
from sapt_jax.ask.model import Model, load
from sapt_jax.ask.questions import Question
from sapt_jax.command_line import told_in_one_line

_TELL_EVERY_SECONDS = 10.0
_SEARCH = {"max_new_tokens": int, "beams": int, "temperature": float, "top_p": float, "seed": int}
_HELP = "/task NAME   /definition TEXT   /plain (no instruction)   /tasks   /quit"


class Line(NamedTuple):
    """One line of the input: its number from 1, and its bytes."""

    number: int
    text: bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers, and returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    with told_in_one_line("sapt_jax.predict", code=2):
        model = load(given.run, given.base)
        search = model.search(**{name: getattr(given, name) for name in _SEARCH if getattr(given, name) is not None})
        if given.task is not None and given.definition is None and given.task not in model.instructions:
            raise ValueError(f"--task={given.task}: the run has {', '.join(model.instructions)}")
        asked = Question("", given.task, given.definition)
        if given.input is None:
            return _converse(model, search, asked)
        return _Stream(model, search, asked).run(given.input, given.output)


class _Stream:
    """Answers the lines of a file in their order, a batch at a time, and never waits for lines that may not come."""

    def __init__(self, model: Model, search: Search, asked: Question):
        self._model, self._search, self._asked = model, search, asked
        self._done = self._bad = 0

    def run(self, source: str, target: str) -> int:
        """Answers `source` into `target`, paths or "-"; returns the exit status."""
        after = _resume(Path(target), source) if target != "-" else 0
        start = told = time.monotonic()
        with contextlib.ExitStack() as files:
            lines = sys.stdin.buffer if source == "-" else files.enter_context(open(source, "rb"))
            out = sys.stdout if target == "-" else files.enter_context(open(target, "a", encoding="utf-8"))
            for batch in _batches(lines, self._model.most_rows, after):
                for row in self._answer(batch):
                    out.write(_line(row))
                out.flush()
                if time.monotonic() - told > _TELL_EVERY_SECONDS:
                    told = time.monotonic()
                    self._tell(told - start)
        self._tell(time.monotonic() - start)
        return int(self._bad > 0)

    def _tell(self, seconds: float) -> None:
        speed = self._done / max(seconds, 1e-9)
        print(f"{self._done} lines answered, {self._bad} faulty, {speed:.1f} a second", file=sys.stderr)

    def _answer(self, lines: list[Line]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        places, rows = [], []
        for line in lines:
            entry: dict[str, Any] = {"line": line.number}
            try:
                given = _parse(line.text)
                entry |= {"id": given["id"]} if "id" in given else {}
                entry["input"] = given.get("messages", given.get("input"))
                task = given.get("task", self._asked.task)
                # A line's own task has its own instruction.
                own = None if "task" in given else self._asked.definition
                question = Question(entry["input"], task, given.get("definition", own))
                rows.append(self._model.row(question, self._search, line.number))
                places.append(len(told))
            except ValueError as error:
                self._bad += 1
                entry["error"] = str(error)
                print(f"line {line.number}: {error}", file=sys.stderr)
            told.append(entry)
        for place, answer in zip(places, self._model.answer(rows), strict=True):
            told[place] |= {
                "prediction": answer.text,
                "attention": {name: round(weight, 6) for name, weight in answer.attention.items()},
                "finished": answer.finished,
                "cut": answer.cut,
            }
        self._done += len(rows)
        return told


def _line(row: dict[str, Any]) -> str:
    """A line of the output. Half of a surrogate pair, which no file can hold as it is, stays the escape that it was."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _parse(text: bytes) -> dict[str, Any]:
    """The fields of a line: {"input": ...} where it is a text."""
    try:
        line = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from None
    if not line.startswith("{"):
        return {"input": line}
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"malformed JSON: {error}") from None
    # A table with a column more writes null where a row has nothing in it.
    given = {name: value for name, value in given.items() if value is not None}
    if ("input" in given) == ("messages" in given):
        raise ValueError('give either "input" or "messages"')
    for name in ("task", "definition"):
        if name in given and not isinstance(given[name], str):
            raise ValueError(f'"{name}" must be a text, not {given[name]!r:.60}')
    return given


def _batches(lines: BinaryIO, size: int, after: int) -> Iterator[list[Line]]:
    """The lines with a text after line `after`: as many as are there, at least one and at most `size`."""
    waiting: queue.Queue[Line | None] = queue.Queue(maxsize=2 * size)

    def read() -> None:
        try:
            for number, text in enumerate(lines, start=1):
                if number > after and text.strip():
                    waiting.put(Line(number, text))
        finally:
            waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := waiting.get()) is not None:
        batch = [line]
        while len(batch) < size:
            try:
                line = waiting.get_nowait()
            except queue.Empty:
                break
            if line is None:
                yield batch
                return
            batch.append(line)
        yield batch


def _resume(target: Path, source: str) -> int:
    """The input line that an output goes on after; what was cut off in the middle of a line is taken away.

    Raises:
      ValueError: the output is that of another input.
    """
    if not target.is_file():
        return 0
    written = target.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if not written:
        return 0
    if source == "-":
        raise ValueError(f"--output={target} is there, and a stream does not come twice: name another file.")
    wrong = f"--output={target} holds something else than answers to --input={source}: name another file, or remove it."
    if not whole and written.startswith(b'{"line": '):
        target.write_bytes(b"")
        return 0
    try:
        last = json.loads(whole.splitlines()[-1])
        after = int(last["line"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(wrong) from None
    if "input" in last and last["input"] != _input_of(_nth(source, after)):
        raise ValueError(wrong)
    with target.open("r+b") as out:
        out.truncate(len(whole))
    return after


def _nth(source: str, number: int) -> bytes:
    with open(source, "rb") as lines:
        return next((line for count, line in enumerate(lines, start=1) if count == number), b"")


def _input_of(line: bytes) -> Any:
    try:
        given = _parse(line)
    except ValueError:
        return None
    return given.get("messages", given.get("input"))


def _converse(model: Model, search: Search, asked: Question) -> int:
    """Answers what is typed, until the end of the input."""
    print(f"{len(model.tasks)} tasks: {', '.join(model.tasks)}\n{_HELP}")
    number = 0
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return 0
        if command == "/task" and rest.strip() in model.instructions:
            asked = Question("", rest.strip())
        elif command == "/definition":
            asked = Question("", asked.task, rest.strip())
        elif command == "/plain":
            asked = Question("")
        elif command == "/tasks":
            for name, definition in model.instructions.items():
                print(f"{name}: {definition.strip()[:100]}")
        elif command.startswith("/"):
            print(_HELP)
        elif text:
            number += 1
            try:
                row = model.row(Question(text, asked.task, asked.definition), search, number)
                _show(*model.answer([row]))
            except ValueError as error:
                print(f"error: {error}")


def _show(answer: Answer) -> None:
    print(answer.text)
    most = sorted(answer.attention.items(), key=lambda pair: -pair[1])[:3]
    if most:
        print("  " + "  ".join(f"{name} {weight:.0%}" for name, weight in most))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sapt_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="the --workdir of a run")
    parser.add_argument("--base", default="", help="where the base model lies now, if not where the run found it")
    parser.add_argument("--input", help="a file of lines, or - for stdin; left out: a prompt to try things")
    parser.add_argument("--output", default="-", help="a file that is written, or gone on with; by default stdout")
    parser.add_argument("--task", help="whose instruction goes before an input; by default there is none")
    parser.add_argument("--definition", help="an instruction in place of the task's")
    for name, kind in _SEARCH.items():
        parser.add_argument(f"--{name}", type=kind, help="of the search; by default as in the run's tests")
    return parser


if __name__ == "__main__":
    sys.exit(main())
