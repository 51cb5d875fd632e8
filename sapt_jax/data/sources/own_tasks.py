"""A user's own tasks: one folder for each task, `{root}/{task}`, with the splits train, test and, if wanted, dev.

A split is one of
  - `{split}.jsonl`: one object on each line;
  - `{split}.csv`: with a header line;
  - `{split}.parquet`, `{split}-*.parquet` or `data/{split}-*.parquet`, as on the Hugging Face hub;
  - a folder `{split}`, as `datasets.DatasetDict.save_to_disk` leaves it.
A row has "input" and "output" (a string, or a list of references; optional "id"). An "instruction" of its own stands
before the input, and alone where the input is empty or absent. Or it has "messages", a chat of
{"role", "content"} whose last turn, the assistant's, is the output. A content is a string or a list of text parts. The
turns before are written as the tokenizer's chat template has it, where it has one (an instruction then begins the first
turn of the user). Else one turn of the user is taken as it is, and several become lines "role: content".

Optional beside the splits: `definition.txt`, the instruction put before every input, and `task.json` with any of
{"definition": str, "metric": "rouge_l" | "exact_match", "labels": [str, ...]}.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sapt_jax.data.sources.table_files import parquet_files, saved_files, table_rows
from sapt_jax.data.sources.task_files import folders_in, nearest_name
from sapt_jax.data.task import Task, check_labels, check_text, parse_json, read_instances, read_json, read_text

Rows = Iterator[tuple[str, Any]]

_CHAT_FORM = '"messages" must be two or more {"role", "content"}, the last of role "assistant"'


def _jsonl_rows(file: Path) -> Rows:
    # Line by line, so that one bad line is one faulty row, not the end of the file.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        where = f"{file}: line {number}"
        if line.strip():
            try:
                yield where, parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), where)
            except UnicodeDecodeError as error:
                yield where, ValueError(f"{where}: byte {error.start} of the line is not UTF-8 text")
            except ValueError as error:
                yield where, error


def _csv_rows(file: Path) -> Rows:
    text = read_text(file)
    # A cell may be as long as the file.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = reader.fieldnames or ()
    if "output" not in columns or not {"input", "instruction"} & set(columns):
        raise ValueError(f"{file}: its first line must name the columns input and output, not {list(columns)}.")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{file}: its first line names the column {twice[0]!r} twice. Mend the file.")
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{file}: malformed CSV after line {reader.line_num}: {error}. Mend the file.") from error
        if row is None:
            return
        where = f"{file}: line {reader.line_num}"
        ragged = None in row or None in row.values()
        yield where, ValueError(f"{where} has not {len(columns)} columns as the first line") if ragged else row


def _split_rows(folder: Path, split: str) -> Rows | None:
    """The rows of a split in whichever form it is there, or None. Two forms of one split are an error."""
    parquet, arrow = parquet_files(folder, split), saved_files(folder, split)
    found = {
        f"{split}.jsonl": (folder / f"{split}.jsonl").is_file() and _jsonl_rows(folder / f"{split}.jsonl"),
        f"{split}.csv": (folder / f"{split}.csv").is_file() and _csv_rows(folder / f"{split}.csv"),
        "parquet files": parquet and table_rows(parquet),
        f"the folder {split}": arrow and table_rows(arrow),
    }
    found = {form: rows for form, rows in found.items() if rows}
    if len(found) > 1:
        raise ValueError(f"{folder}: the {split} split is there as {' and as '.join(found)}. Leave one of them.")
    return next(iter(found.values()), None)


def _content(turn: Any) -> str:
    """The text of a turn; raises ValueError where it has none."""
    if isinstance(turn, ValueError):
        raise turn
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError(_CHAT_FORM)
    if turn.get("tool_calls"):
        raise ValueError('"messages" holds tool_calls, which are not read: write the call into the turn\'s content')
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
        content = "".join(parts) if whole else None
    if not isinstance(content, str):
        raise ValueError(f'{_CHAT_FORM}; a "content" must be a string or a list of {{"type": "text", "text": ...}}')
    return content


def read_turns(messages: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    """The turns (role, content) of a chat.

    Raises:
      ValueError: a turn is not of the form that the head of this file shows.
    """
    contents = [_content(turn) for turn in messages]
    return tuple(zip((turn["role"] for turn in messages), contents, strict=True))


def written_out(turns: Sequence[tuple[str, str]]) -> str:
    """A chat as text, for tokenizers without a chat template: one turn as it is, several as lines "role: content"."""
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)


def as_pair(entry: Any) -> Any:
    """Brings a row with an instruction of its own, or with a chat, into the form of input and output."""
    if not isinstance(entry, dict):
        return entry
    if "messages" in entry:
        return _from_messages(entry)
    instruction = entry.get("instruction")
    if instruction is None:
        return entry
    if not isinstance(instruction, str):
        return ValueError(f'"instruction" must be a string, not {instruction!r:.60}')
    text = entry.get("input") or ""
    if not isinstance(text, str):
        return entry
    return {**entry, "input": "\n\n".join(part for part in (instruction, text) if part.strip())}


def _from_messages(entry: dict[str, Any]) -> Any:
    """Turns a chat into input and output: the last turn is the output, those before it are the input."""
    if entry.get("instruction"):
        return ValueError('has "messages" and "instruction": write the instruction into a turn of the chat')
    messages = entry["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        return ValueError(_CHAT_FORM)
    try:
        *before, (last, answer) = read_turns(messages)
    except ValueError as error:
        return error
    if last != "assistant":
        return ValueError(_CHAT_FORM)
    return {"id": entry.get("id"), "input": written_out(before), "output": answer, "chat": tuple(before)}


def read_own_task(name: str, *, root: Path, on_bad_instance: str) -> Task:
    """Reads the task in `root/name`; dev is () when the folder has none.

    Raises ValueError for an unknown task (naming the nearest), FileNotFoundError for a missing split. Parquet
    and Arrow files need pyarrow.
    """
    folder = root / name
    if not folder.is_dir():
        present = folders_in(root)
        raise ValueError(f"unknown task {name!r}: {root} has no such folder. {nearest_name(name, present)}")
    problems: list[str] = []
    instances = {}
    for split in ("train", "dev", "test"):
        rows = _split_rows(folder, split)
        if rows is None and split != "dev":
            raise FileNotFoundError(
                f"{folder}: the {split} split is missing. Put {split}.jsonl there, one "
                f'{{"input": ..., "output": ...}} a line (or {split}.csv, or {split}.parquet).'
            )
        instances[split] = read_instances(
            ((where, as_pair(entry)) for where, entry in rows or ()),
            prefix=f"{name}-{split}",
            on_bad_instance=on_bad_instance,
            problems=problems,
        )
    about_file, definition_file = folder / "task.json", folder / "definition.txt"
    about = read_json(about_file) if about_file.is_file() else {}
    known = isinstance(about, dict) and set(about) <= {"definition", "metric", "labels"}
    if not known or about.get("metric", "rouge_l") not in ("rouge_l", "exact_match"):
        raise ValueError(
            f'{about_file}: it may hold "definition", "metric" ("rouge_l" or "exact_match") and "labels"; '
            f"found {about!r:.200}."
        )
    definition = check_text(about.get("definition", ""), f'{about_file}: "definition"')
    return Task(
        name,
        read_text(definition_file) if definition_file.is_file() else definition,
        **instances,
        metric=about.get("metric", "rouge_l"),
        labels=check_labels(about.get("labels", []), f'{about_file}: "labels"'),
        problems=tuple(problems),
    )
