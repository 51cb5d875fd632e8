"""A user's own tasks: every form of a split gives the same task, and every fault names its place."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from sapt_jax.data.sources import table_files
from sapt_jax.data.sources.own_tasks import read_own_task


def random_rows(seed, n=6):
    rng = np.random.default_rng(seed)
    # Quotes, commas, line ends and letters beyond ASCII, for the formats to keep.
    letters = list('abc é漢 ",\n')
    texts = ["x" + "".join(rng.choice(letters, 12)) + "x" for _ in range(2 * n)]
    return [{"input": texts[i], "output": texts[n + i]} for i in range(n)]


def write_jsonl(folder, split, rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder, split, rows):
    with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["input", "output"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder, split, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def write_hub_parquet(folder, split, rows):
    (folder / "data").mkdir(exist_ok=True)
    for part, own in enumerate((rows[:2], rows[2:])):
        file = folder / "data" / f"{split}-0000{part}-of-00002.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(own), file)


def write_saved_dataset(folder, split, rows):
    (folder / split).mkdir()
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / split / "data-00000-of-00001.arrow"), "wb") as sink:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def write_messages(folder, split, rows):
    chats = [
        {"messages": [{"role": "user", "content": r["input"]}, {"role": "assistant", "content": r["output"]}]}
        for r in rows
    ]
    write_jsonl(folder, split, chats)


FORMS = [write_jsonl, write_csv, write_parquet, write_hub_parquet, write_saved_dataset, write_messages]


def task_folder(root, name="mine"):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read(root, on_bad_instance="error", name="mine"):
    return read_own_task(name, root=root, on_bad_instance=on_bad_instance)


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_task(tmp_path, write):
    folder = task_folder(tmp_path)
    splits = {split: random_rows(seed) for seed, split in enumerate(("train", "dev", "test"))}
    for split, rows in splits.items():
        write(folder, split, rows)
    task = read(tmp_path)
    for split, rows in splits.items():
        got = getattr(task, split)
        assert [(i.input, i.outputs) for i in got] == [(row["input"], (row["output"],)) for row in rows]
        assert [i.id for i in got] == [f"mine-{split}-{n}" for n in range(len(rows))]


def test_what_stands_beside_the_splits(tmp_path):
    folder = task_folder(tmp_path)
    for split in ("train", "test"):
        write_jsonl(folder, split, random_rows(3))
    assert (read(tmp_path).definition, read(tmp_path).metric, read(tmp_path).dev) == ("", "rouge_l", ())
    (folder / "task.json").write_text('{"definition": "A", "metric": "exact_match", "labels": ["x", "y"]}')
    task = read(tmp_path)
    assert (task.definition, task.metric, task.labels) == ("A", "exact_match", ("x", "y"))
    (folder / "definition.txt").write_text("B é", encoding="utf-8")
    assert read(tmp_path).definition == "B é"
    (folder / "task.json").write_text('{"metrics": "exact_match"}')
    with pytest.raises(ValueError, match="task.json: it may hold"):
        read(tmp_path)
    (folder / "definition.txt").write_bytes(b"\xff")
    (folder / "task.json").unlink()
    with pytest.raises(ValueError, match="definition.txt: byte 0 is not UTF-8"):
        read(tmp_path)


def test_a_chat_of_several_turns_becomes_lines(tmp_path):
    folder = task_folder(tmp_path)
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Me")]
    chat = {"id": 7, "messages": [{"role": role, "content": content} for role, content in turns]}
    for split in ("train", "test"):
        write_jsonl(folder, split, [chat])
    (instance,) = read(tmp_path).test
    assert instance.input == "system: Be kind.\nuser: Hi\nassistant: Hello\nuser: Who?"
    assert (instance.outputs, instance.id) == (("Me",), "7")
    assert instance.chat == tuple(turns[:-1])


def test_text_parts_of_a_chat_are_joined(tmp_path):
    folder = task_folder(tmp_path)
    parts = [{"type": "text", "text": "Capital "}, {"type": "text", "text": "of Norway?"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Oslo"}]}
    for split in ("train", "test"):
        write_jsonl(folder, split, [chat])
    (instance,) = read(tmp_path).train
    assert (instance.input, instance.outputs) == ("Capital of Norway?", ("Oslo",))
    assert instance.chat == (("user", "Capital of Norway?"),)


def test_a_column_called_chat_is_none(tmp_path):
    folder = task_folder(tmp_path)
    for split in ("train", "test"):
        write_jsonl(folder, split, [{"input": "a", "output": "b", "chat": [["user", "c"]]}])
    assert read(tmp_path).train[0].chat == ()


@pytest.mark.parametrize(
    "line, fault",
    [
        (b'{"input": "a", "output": "b"', r"malformed JSON at line 1, column 29"),
        (b'{"input": "caf\xe9", "output": "b"}', r"byte 14 of the line is not UTF-8"),
        (b'{"input": "a"}', r"has no 'output'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', r'"messages" must be'),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}', r'"messages" must be'),
        (b'{"messages": ["a", {"role": "assistant", "content": "b"}]}', r'"messages" must be'),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}, '
            b'{"role": "assistant", "content": "b"}]}',
            r'"messages" holds tool_calls',
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, '
            b'{"role": "assistant", "content": "b"}]}',
            r'a "content" must be a string',
        ),
        (b"[1]", r"is list, not an object"),
        (b'{"input": "a", "output": "cut \\ud83d"}', r'"output" holds half a character, .ud83d, at place 4'),
        (b'{"input": "\\ude00 cut", "output": "b"}', r'"input" holds half a character, .ude00, at place 0'),
        (b'{"input": "a", "output": "b", "input": "c"}', r"names the key 'input' twice"),
        (
            b'{"messages": [{"role": "user", "content": "a", "content": "c"}, {"role": "assistant", "content": "b"}]}',
            r"names the key 'content' twice",
        ),
        (b'{"input": "a", "output": ' + b"[" * 100_000 + b"}", r"nested too deeply"),
        (b'{"input": "a", "output": ' + b"9" * 5000 + b"}", r"malformed JSON: Exceeds the limit"),
        (b'{"input": "a", "output": 5}', r'"output" must be a string or a list of strings, not 5'),
        (b'{"input": null, "output": "b"}', r'"input" must be a string, not None'),
        (b'{"instruction": 7, "output": "b"}', r'"instruction" must be a string, not 7'),
        (b'{"instruction": "a", "messages": []}', r'has "messages" and "instruction"'),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path, line, fault):
    folder = task_folder(tmp_path)
    write_jsonl(folder, "test", random_rows(4))
    good = json.dumps(random_rows(5, 1)[0]).encode()
    (folder / "train.jsonl").write_bytes(good + b"\n\n" + line + b"\n" + good)
    with pytest.raises(ValueError, match=f"train.jsonl: line 3.*{fault}.*on_bad_instance"):
        read(tmp_path)
    task = read(tmp_path, "skip")
    assert len(task.train) == 2 and len(task.problems) == 1 and "line 3" in task.problems[0]


def test_an_instruction_stands_before_the_input(tmp_path):
    folder = task_folder(tmp_path)
    rows = [
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        {"instruction": "Name a dog.", "input": "", "output": "Rex"},
        {"instruction": "Name a cat.", "output": "Tom"},
        {"instruction": "", "input": "a", "output": "b"},
    ]
    write_jsonl(folder, "train", rows)
    (folder / "test.csv").write_text("instruction,output\nName a fish.,Bob\n")
    task = read(tmp_path)
    assert [i.input for i in task.train] == ["Translate.\n\nHaus", "Name a dog.", "Name a cat.", "a"]
    assert [(i.input, i.outputs) for i in task.test] == [("Name a fish.", ("Bob",))]


@pytest.mark.parametrize(
    "text, fault",
    [
        ('{"definition": 3}', '"definition" must be a string, not 3'),
        ('{"definition": "\\ud83d"}', '"definition" holds half a character'),
        ('{"labels": "yes"}', "\"labels\" must be a list of strings, not 'yes'"),
        ('{"labels": 5}', '"labels" must be a list of strings, not 5'),
        ('{"labels": ["yes", 0]}', '"labels": each label must be a string, not 0'),
        ('{"metric": ["rouge_l"]}', "it may hold"),
        ("[]", "it may hold"),
        ('{"labels": [], "labels": []}', "names the key 'labels' twice"),
    ],
)
def test_wrong_types_beside_the_splits(tmp_path, text, fault):
    folder = task_folder(tmp_path)
    for split in ("train", "test"):
        write_jsonl(folder, split, random_rows(3))
    (folder / "task.json").write_text(text)
    with pytest.raises(ValueError, match=f"task.json.*{fault}"):
        read(tmp_path)


def test_a_saved_dataset_is_what_its_own_index_names(tmp_path):
    folder, rows = task_folder(tmp_path), random_rows(9)
    write_saved_dataset(folder, "train", rows)
    write_saved_dataset(folder, "test", rows)
    data = folder / "train" / "data-00000-of-00001.arrow"
    for stray in ("cache-a811.arrow", "._data-00000-of-00001.arrow", "tmp1.arrow"):
        (folder / "train" / stray).write_bytes(data.read_bytes())
    state = folder / "train" / "state.json"
    for index in ({"_data_files": [{"filename": data.name}]}, None):
        if index:
            state.write_text(json.dumps(index))
        else:
            state.unlink()
            (folder / "train" / "tmp1.arrow").unlink()
        assert [i.input for i in read(tmp_path).train] == [row["input"] for row in rows]
    for names, fault in (
        ([data.name, "data-00001-of-00002.arrow"], "data-00001-of-00002.arrow is missing, which .*state.json names"),
        (["../../secret.arrow"], "state.json: _data_files.*holds a slash"),
        ([], 'state.json has no list "_data_files"'),
    ):
        state.write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        with pytest.raises((ValueError, FileNotFoundError), match=fault):
            read(tmp_path)
    state.unlink()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "dev", "test"]}')
    with pytest.raises(FileNotFoundError, match="dev is missing, which .*dataset_dict.json names"):
        read(tmp_path)


def test_a_missing_part_of_several_is_named(tmp_path):
    folder = task_folder(tmp_path)
    for split in ("train", "test"):
        write_hub_parquet(folder, split, random_rows(9))
    (folder / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="data: train-00001-of-00002.parquet is missing beside"):
        read(tmp_path)


def test_a_long_cell_and_a_column_twice(tmp_path):
    folder = task_folder(tmp_path)
    write_jsonl(folder, "test", random_rows(6))
    long = "word " * 40_000
    write_csv(folder, "train", [{"input": long, "output": "yes"}, {"input": "short", "output": "no"}])
    assert [i.input for i in read(tmp_path).train] == [long, "short"]
    (folder / "train.csv").write_text("input,output,input\na,b,c\n")
    with pytest.raises(ValueError, match="train.csv: its first line names the column 'input' twice"):
        read(tmp_path)


def test_csv_faults_name_the_line(tmp_path):
    folder = task_folder(tmp_path)
    write_jsonl(folder, "test", random_rows(6))
    (folder / "train.csv").write_text("input,output\na,b\nc\nd,e,f\ng,h\n")
    with pytest.raises(ValueError, match="train.csv: line 3 has not 2 columns"):
        read(tmp_path)
    task = read(tmp_path, "skip")
    assert [i.input for i in task.train] == ["a", "g"] and len(task.problems) == 2
    (folder / "train.csv").write_text('input,output\na,b\n"c"d,e\n')
    with pytest.raises(ValueError, match="train.csv: malformed CSV after line 2"):
        read(tmp_path)
    (folder / "train.csv").write_text("text,label\na,b\n")
    with pytest.raises(ValueError, match="train.csv: its first line must name the columns input and output"):
        read(tmp_path)


def test_missing_double_and_broken_splits(tmp_path):
    folder = task_folder(tmp_path, "my_task")
    with pytest.raises(ValueError, match="unknown task 'my_tosk'.*nearest known name is 'my_task'"):
        read(tmp_path, name="my_tosk")
    with pytest.raises(FileNotFoundError, match="my_task: the train split is missing. Put train.jsonl there"):
        read(tmp_path, name="my_task")
    write_jsonl(folder, "train", random_rows(7))
    with pytest.raises(FileNotFoundError, match="the test split is missing"):
        read(tmp_path, name="my_task")
    write_csv(folder, "train", random_rows(7))
    with pytest.raises(ValueError, match="the train split is there as train.jsonl and as train.csv"):
        read(tmp_path, name="my_task")
    (folder / "train.csv").unlink()
    (folder / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="test.parquet: cannot be read"):
        read(tmp_path, name="my_task")


def test_null_columns_of_a_table_are_absent(tmp_path):
    folder = task_folder(tmp_path)
    rows = [{"input": "a", "output": ["b", "c"]}, {"input": "d", "output": None}]
    for split in ("train", "test"):
        write_parquet(folder, split, rows)
    with pytest.raises(ValueError, match="train.parquet: row 1 has no 'output'"):
        read(tmp_path)
    assert [i.outputs for i in read(tmp_path, "skip").train] == [("b", "c")]


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = task_folder(tmp_path)
    write_parquet(folder, "train", random_rows(8))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(table_files.importlib, "import_module", missing)
    with pytest.raises(ValueError, match="train.parquet: reading it needs pyarrow. .*pip install pyarrow"):
        read(tmp_path)
