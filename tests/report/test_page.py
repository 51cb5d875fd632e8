"""The page: everything that comes from data is text, it stands alone, it is small, and every state of a run has one."""

import json
import re
from html.parser import HTMLParser

import pytest

from sapt_jax.report import page, told
from sapt_jax.report.__main__ import main
from sapt_jax.report.browse import browser_data
from sapt_jax.report.gather import group_runs, read_runs
from sapt_jax.results.record import read_record
from tests.helpers.left_behind import HOSTILE, write_quality, write_run
from tests.results.test_figures import LONG, SITUATIONS


class Parsed(HTMLParser):
    """Tags with their attributes, ids, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text.append(data)


def answers_of(text):
    (data,) = re.findall(r'<script type="application/json" id="answers">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run whose texts and settings try to be markup."""
    folder = tmp_path_factory.mktemp("hostile") / "a<b>&c"
    run = write_run(folder, ("<script>", "b&'\"c"), text=HOSTILE, data_dir=HOSTILE)
    return page.make_page([read_record(run)])


@pytest.mark.slow
def test_what_comes_from_data_is_text(hostile):
    parsed = Parsed(hostile)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 2
    assert [tag for tag, attributes in parsed.tags if tag == "img" or "onerror" in attributes] == []
    assert "\u2028" not in re.search(r'id="answers">(.*?)</script>', hostile, re.DOTALL)[1]
    rows = answers_of(hostile)["a<b>&c"]["rows"]
    assert rows[0]["i"] == f"say 0 {HOSTILE}"
    assert any(HOSTILE in text for text in parsed.text), "the setting data_dir"


def test_the_page_stands_alone(hostile):
    parsed = Parsed(hostile)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), (tag, value)
    assert not re.search(r"url\((?!#)", hostile) and "@import" not in hostile
    (policy,) = (a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_figure_has_words_and_every_id_is_one(hostile):
    parsed = Parsed(hostile)
    figures = [a for tag, a in parsed.tags if tag == "figure"]
    pictures = [a for _, a in parsed.tags if a.get("role") == "img"]
    assert len(figures) == len(pictures) > 8
    assert all(len(picture["aria-label"]) > 30 for picture in pictures)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', hostile))
    assert used <= set(ids)


@pytest.mark.slow
def test_the_page_tells_what_was_run(tmp_path):
    extra = {
        "labels": {
            "needs_task_id": True,
            "routing": "method",
            "old_data": "real",
            "rows": 7,
            "bytes": 2000,
            "parameters": 500,
        },
        "routing": {"accuracy": 0.875, "by_task": {}},
        "costs": {name: {"seconds": 61.0, "peak_bytes": 3_000_000_000} for name in ("shout", "mirror", "first")},
        "truncated": {"shout": [3, 1]},
    }
    run = write_run(tmp_path / "run", extra=extra, **{"sapt.kl_ratio": 0.125, "ewc.strength": 5.0})
    write_quality(run, 0, "shout")
    text = " ".join(" ".join(Parsed(page.make_page([read_record(run)])).text).split())
    for fact in ("sapt.kl_ratio 0.125", "87.5%", "real, 7 rows", "2 kB, 500 parameters", "3:03", "3 GB"):
        assert fact in text, fact
    assert "3 prompts and 1 answers were cut" in text and "7 texts" in text
    assert "ewc.strength" not in text, "a setting of a method that did not run"


def test_a_gate_that_stayed_closed_is_warned_of(tmp_path):
    run = write_run(tmp_path / "run")
    closed = (run / "metrics.jsonl").read_text().splitlines()
    changed = []
    for line in closed:
        record = json.loads(line)
        if record["kind"] == "train" and record["task_index"] == 2:
            record["attention"] = [0.6, 0.4, 0.0]
        changed.append(json.dumps(record) + "\n")
    (run / "metrics.jsonl").write_text("".join(changed))
    record = read_record(run)
    (warning,) = told.warnings_of(record, told.settings_of(record))
    assert warning.startswith("first: the mean attention on the new slot stayed under")


@pytest.mark.slow
@pytest.mark.parametrize("situation", ["young", "no attention"])
def test_every_situation_has_a_page(situation, tmp_path):
    fields = dict(SITUATIONS[situation])
    tasks = [fields.pop("tasks")] if "tasks" in fields else []
    write_run(tmp_path / "one" / "run", *tasks, **fields)
    assert main([str(tmp_path / "one"), f"--out={tmp_path / 'report.html'}"]) == 0
    Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_five_methods_on_fifteen_tasks_fit(tmp_path):
    """The figures of one run, five times, with what all runs share, are under 3 MB."""
    extra = {"single_task_scores": dict.fromkeys(LONG, 50.0)}
    run = write_run(tmp_path / "run", LONG, rows=100, steps=400, extra=extra, text="x" * 300)
    for index, name in enumerate(LONG):
        write_quality(run, index, name)
    record = read_record(run)
    text = page.make_page([record])
    answers = re.search(r'id="answers">(.*?)</script>', text, re.DOTALL)[1]
    assert 0.5 * page.ANSWERS_BUDGET < len(answers) < 1.1 * page.ANSWERS_BUDGET
    assert 5 * (len(text) - len(answers)) + 1.1 * page.ANSWERS_BUDGET < 3_000_000
    held = json.loads(answers)["run"]
    assert held["of"] == 1500 and {row["t"] for row in held["rows"]} == set(range(15))


def test_the_browser_says_when_answers_changed(tmp_path):
    run = write_run(tmp_path / "run", rows=3)
    data = browser_data(read_record(run), 10**6)
    assert (data["shown"], data["of"]) == (9, 9)
    by_task = {(row["t"], row["i"]): row["h"] for row in data["rows"]}
    # Even rows answer with the number of the last task, odd rows always alike.
    assert by_task[0, "say 0 "] == [(0, "answer 0 ", 0.0), (1, "answer 1 ", 0.0), (2, "answer 2 ", 0.0)]
    assert by_task[0, "say 1 "] == [(0, "answer 1 ", 100.0)]
    assert all(sum(row["a"]) in range(98, 103) for row in data["rows"])
    small = browser_data(read_record(run), 700)
    assert 0 < small["shown"] < 9 and small["of"] == 9


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    for method in ("sapt", "sequential"):
        for seed in (1, 2):
            # A method may have a rate of its own.
            rate = {"optimizer.learning_rate": {"sapt": 3e-4, "sequential": 1e-3}[method]}
            write_run(tmp_path / "study" / f"{method}-{seed}", method=method, seed=seed, **rate)
    write_run(tmp_path / "study" / "warm", seed=1, **{"sapt.warm_start_steps": 50})
    write_run(tmp_path / "study" / "other", seed=1, **{"model.path": "models/Llama-2-7b/"})
    (tmp_path / "study" / "tables").mkdir()
    groups = group_runs(read_runs([str(tmp_path / "study")]))
    found = {group.label: [record.name for record in group.records] for group in groups}
    assert found == {
        "sapt, Llama-2-7b": ["other"],
        "sapt, unknown model": ["sapt-1", "sapt-2"],
        "sequential, unknown model": ["sequential-1", "sequential-2"],
        "sapt, warm_start_steps=50, unknown model": ["warm"],
    }


def test_a_workdir_inside_another_is_part_of_it(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "oracle").mkdir()
    (run / "oracle" / "scores.json").write_bytes((run / "scores.json").read_bytes())
    records = read_runs([str(tmp_path), str(run)])
    assert [record.name for record in records] == ["run"]
    (warning,) = told.warnings_of(records[0], told.settings_of(records[0]))
    assert warning.startswith("oracle/ holds the scores of another way to test this run")


def test_a_folder_without_runs_is_told_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), f"--out={tmp_path / 'report.html'}"])
    assert ended.value.code == 2 and "no run lies here" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_figures_are_written_as_files(tmp_path, capsys):
    write_run(tmp_path / "runs" / "one", finished=1)
    write_run(tmp_path / "runs" / "two", ("shout",), attention=False, method="sequential")
    for name in ("one", "two"):
        # Curves take longest to draw.
        (tmp_path / "runs" / name / "metrics.jsonl").unlink()
    out = tmp_path / "figures"
    assert main([str(tmp_path / "runs"), f"--out={tmp_path / 'r.html'}", f"--figures={out}"]) == 0
    names = {str(file.relative_to(out)) for file in out.rglob("*.*")}
    assert {f"one/score_matrix-{width}.{kind}" for width in ("1col", "2col") for kind in ("pdf", "svg", "png")} <= names
    assert "summary-2col.pdf" in names and "two/attention_at_test-1col.pdf" not in names
    assert f"{len(names)} files" in capsys.readouterr().out
