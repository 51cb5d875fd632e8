"""What every source of data hands over: a `Task` of `Instance`s, and the check each row passes on the way
in."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BAD_INSTANCE_SETTINGS = ("error", "skip_empty", "skip", "keep")


@dataclasses.dataclass(frozen=True)
class Instance:
    """One example.

    Attributes:
      id: unique within the task.
      input: the text that asks.
      outputs: every reference answer.
      chat: the same input as turns (role, content), for models with a chat template; () where it was no chat.
      where: the file and row that it was read from, for errors; "" where it comes from no file.
    """

    id: str
    input: str
    outputs: tuple[str, ...]
    chat: tuple[tuple[str, str], ...] = ()
    where: str = dataclasses.field(default="", compare=False)

    @property
    def place(self) -> str:
        """What an error calls it."""
        return self.where or f"instance {self.id}"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of the stream.

    An empty `dev` means "not cut yet" (see `benchmarks.cut_splits`). `metric` is a key of `results.metrics.METRICS`,
    `prompt` names a template of `prompts.TEMPLATES`, `labels` lists the answers of a classification task when
    they are known, and `problems` has one line for each row that was skipped or kept although it is faulty.
    """

    name: str
    definition: str
    train: tuple[Instance, ...]
    dev: tuple[Instance, ...]
    test: tuple[Instance, ...]
    metric: str = "rouge_l"
    prompt: str = "plain"
    labels: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def read_text(path: Path) -> str:
    """Reads a UTF-8 file. Raises ValueError naming the file and the byte where the text stops being UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8 text. Convert the file, for instance with "
            f"`iconv -f latin1 -t utf-8`."
        ) from error


def parse_json(text: str, where: str) -> Any:
    """Parses JSON.

    An object inside that names a key twice is a ValueError in its place: where it is a row, it is one faulty row.

    Raises:
      ValueError: naming `where`, the line and the column of the first mistake.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}. Mend the file."
        ) from error
    except RecursionError:
        raise ValueError(f"{where}: malformed JSON: lists or objects nested too deeply. Mend the file.") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{where}: malformed JSON: {error}. Mend the file.") from error
    if isinstance(parsed, ValueError):
        raise ValueError(f"{where} {parsed}. Mend the file.")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any] | ValueError:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    keys = [key for key, _ in pairs]
    return ValueError(f"names the key {next(key for key in keys if keys.count(key) > 1)!r} twice")


def read_json(path: Path) -> Any:
    """Parses a JSON file; errors name the file and the position."""
    return parse_json(read_text(path), str(path))


def check_text(value: Any, where: str) -> str:
    """Returns a text that UTF-8 can spell. Raises ValueError naming `where`."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, not {value!r:.60}.")
    if half := half_character(value):
        raise ValueError(f"{where} {half}.")
    return value


def check_labels(value: Any, where: str) -> tuple[str, ...]:
    """Returns the labels of a classification task. Raises ValueError naming `where`."""
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of strings, not {value!r:.60}.")
    return tuple(check_text(label, f"{where}: each label") for label in value)


def half_character(text: str) -> str:
    """Says where a text holds half a character, which JSON can spell and UTF-8 cannot; "" where it holds none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half a character, \\u{ord(text[error.start]):x}, at place {error.start}"
    return ""


def _outputs(entry: dict) -> tuple[str, ...]:
    output = entry["output"]
    outputs = [output] if isinstance(output, str) else output
    if not isinstance(outputs, (list, tuple)) or not all(isinstance(o, str) for o in outputs):
        raise TypeError(f'"output" must be a string or a list of strings, not {output!r:.60}')
    return tuple(outputs)


def _fault(entry: Any) -> tuple[str, bool]:
    """Returns (what is wrong or "", whether the row could be kept all the same)."""
    if isinstance(entry, Exception):
        return str(entry), False
    if not isinstance(entry, dict):
        return f"is {type(entry).__name__}, not an object", False
    missing = [key for key in ("input", "output") if key not in entry]
    if missing:
        return f"has no {' and no '.join(repr(key) for key in missing)}", False
    if not isinstance(entry["input"], str):
        return f'"input" must be a string, not {entry["input"]!r:.60}', False
    try:
        outputs = _outputs(entry)
    except TypeError as error:
        return str(error), False
    texts = (("id", str(entry.get("id"))), ("input", entry["input"]), *(("output", output) for output in outputs))
    for name, text in texts:
        if half := half_character(text):
            return f'"{name}" {half}', False
    if not entry["input"].strip():
        return "has an empty input", True
    if not outputs or not all(output.strip() for output in outputs):
        return "has an empty output", True
    return "", True


def read_instances(
    entries: Iterable[tuple[str, Any]], *, prefix: str, on_bad_instance: str, problems: list[str]
) -> tuple[Instance, ...]:
    """Turns parsed rows into instances.

    Args:
      entries: pairs (where, row); `where` is the file and position that an error names; a row may be an
        Exception that its reader met, which counts as a fault of that row, and may hold a tuple `chat`.
      prefix: ids of rows without an "id" are `{prefix}-{row number}`.
      on_bad_instance: "error" raises ValueError at the first faulty row; "skip" leaves faulty rows out;
        "skip_empty" leaves rows with an empty input or output out, and raises at rows of the wrong form;
        "keep" keeps rows with an empty input or output as they are, and raises at rows of the wrong form.
      problems: gets one line for each row skipped or kept with a fault.
    """
    if on_bad_instance not in BAD_INSTANCE_SETTINGS:
        raise ValueError(f"on_bad_instance must be one of {BAD_INSTANCE_SETTINGS}, not {on_bad_instance!r}.")
    instances = []
    for number, (where, entry) in enumerate(entries):
        fault, keepable = _fault(entry)
        if fault:
            message = fault if fault.startswith(where) else f"{where} {fault}"
            if on_bad_instance == "error" or (on_bad_instance in ("skip_empty", "keep") and not keepable):
                raise ValueError(
                    f"{message.removesuffix(' Mend the file.').rstrip('.')}. Mend the row, or set "
                    f'on_bad_instance="skip" to leave such rows out and count them.'
                )
            problems.append(message)
            if on_bad_instance in ("skip_empty", "skip"):
                continue
        identifier = str(entry.get("id") or f"{prefix}-{number}")
        # A column of the user's own that happens to be called so is no tuple: no file format has them.
        chat = entry.get("chat") if isinstance(entry.get("chat"), tuple) else ()
        instances.append(Instance(identifier, entry["input"], _outputs(entry) or ("",), chat, where))
    return tuple(instances)


def report_problems(task: Task, on_bad_instance: str) -> None:
    """Logs how many rows of a task were skipped or kept with a fault, and the first of them."""
    if task.problems:
        done = "kept" if on_bad_instance == "keep" else "skipped"
        logging.getLogger(__name__).warning(
            "%s: %d faulty row(s) %s, the first: %s", task.name, len(task.problems), done, task.problems[0]
        )
