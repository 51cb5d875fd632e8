"""A study: what runs it has, which of them a process takes, that it goes on, and what it tells."""

import importlib
import io
import shutil
import textwrap
from pathlib import Path

import pytest

from configs import studies
from sapt_jax import continual
from sapt_jax.command_line import load_config
from sapt_jax.config import flatten
from sapt_jax.data.stream import order_of
from sapt_jax.recorded_config import record_config
from sapt_jax.storage import preemption
from sapt_jax.storage.paths import as_path
from sapt_jax.study import __main__ as study
from sapt_jax.study.grid import choose, make_study, plan
from tests.helpers.tiny import tiny_config, write_tasks

STUDIES = sorted(file.stem for file in Path(studies.__file__).parent.glob("*.py"))
STUDIES = [name for name in STUDIES if name not in ("__init__", "methods")]
METHODS = {"sapt": {}, "sequential": {"method": "sequential"}, "single_task": {"method": "single_task"}}
ORDERS = {"one": "shout,mirror", "two": "mirror,shout"}


def small(**overrides):
    return make_study(tiny_config("", **overrides), METHODS, ORDERS, seeds=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_every_study_has_a_sound_config(name):
    module = importlib.import_module(f"configs.studies.{name}")
    assert f"python -m sapt_jax.study --config=configs/studies/{name}.py" in module.__doc__
    runs = plan(module.get_config())
    assert len({run.name for run in runs}) == len(runs) >= 4
    assert any(run.config.method == "single_task" for run in runs)
    for run in runs:
        assert order_of(run.config)


def test_the_promised_studies_are_there():
    assert {"demo", "superni_small", "long_small", "paper_superni_t5_large"} <= set(STUDIES)


def test_runs_come_seed_by_seed_and_differ_as_they_are_called():
    runs = plan(small())
    assert [run.name for run in runs[:4]] == [
        "sapt/one/seed1",
        "sequential/one/seed1",
        "single_task/one/seed1",
        "sapt/two/seed1",
    ]
    assert [run.seed for run in runs] == [1] * 6 + [2] * 6
    first, last = flatten(runs[0].config), flatten(runs[-1].config)
    differ = {name: (first[name], last[name]) for name in first if first[name] != last[name]}
    assert differ == {
        "method": ("sapt", "single_task"),
        "seed": (1, 2),
        "task_order": ("shout,mirror", "mirror,shout"),
    }


def test_parts_of_a_study_are_disjoint_and_whole():
    runs = plan(small())
    parts = [choose(runs, "", f"{part}/5") for part in range(5)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    assert [run.name for run in choose(runs, "sapt/*/seed2, *l*/two/seed1", "")] == [
        "sequential/two/seed1",
        "single_task/two/seed1",
        "sapt/one/seed2",
        "sapt/two/seed2",
    ]
    with pytest.raises(ValueError, match="--only=sap fits none of the runs: sapt/one/seed1, "):
        choose(runs, "sap", "")
    for shard in ("5/5", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="is not i/n with i from 0 to n - 1"):
            choose(runs, "", shard)


def test_a_run_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"sapt/one/seed1: config\.pet\.rank=0"):
        plan(small(**{"pet.rank": 0}))
    with pytest.raises(ValueError, match="cannot be called 'a/b'"):
        plan(make_study(tiny_config(""), {"a/b": {}}, ORDERS, seeds=(1,)))
    with pytest.raises(ValueError, match="made by sapt_jax.study.grid.make_study; this has no config, "):
        plan(tiny_config(""))


CONFIG = """
from sapt_jax.study.grid import make_study
from tests.helpers.tiny import tiny_config

def get_config():
    config = tiny_config({data!r}, **{{"train.epochs": 1, "pseudo_samples.source": "statistics"}})
    methods = {{
        "sapt": {{}},
        "too-fast": {{"method": "sequential", "optimizer.learning_rate": 3e38}},
        "single_task": {{"method": "single_task"}},
    }}
    return make_study(config, methods, {{"one": "shout,mirror"}}, seeds=(1, 2))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    file = folder / "config.py"
    file.write_text(textwrap.dedent(CONFIG.format(data=str(write_tasks(folder / "data", tasks=("shout", "mirror"))))))
    return file


def command(config, workdir, *options):
    output = io.StringIO()
    code = study.main([f"--config={config}", f"--workdir={workdir}", *options], output)
    return code, output.getvalue()


@pytest.mark.slow
def test_a_study_goes_on_tells_failures_and_ends_with_a_table(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preemption, "watch", lambda: None)
    # Two parts of it at first: a run is left half done, as a stopped one is.
    code, text = command(config, tmp_path, "--only=*/seed1", "--shard=0/2")
    assert code == 0 and "study: 0 of 2 runs done, 0 failed; now sapt/one/seed1" in text
    assert "2 of 6 runs of the study" in text and " left, until " in text
    shutil.rmtree(tmp_path / "sapt/one/seed1/tasks/01-mirror")
    shutil.rmtree(tmp_path / "sapt/one/seed1/predictions/01-mirror")
    (tmp_path / "sapt/one/seed1/scores.json").write_text('{"format": 1, ')
    ran = []
    whole = continual.run
    monkeypatch.setattr(continual, "run", lambda config, folder: (ran.append(folder.parts[-3:]), whole(config, folder)))
    code, text = command(config, tmp_path)
    failed = [("too-fast", "one", seed) for seed in ("seed1", "seed2")]
    left = [("sapt", "one", "seed1"), failed[0], ("sapt", "one", "seed2"), failed[1], ("single_task", "one", "seed2")]
    assert code == 1 and ran == left
    message = capsys.readouterr().err
    assert "failed: too-fast/one/seed1: FloatingPointError: " in message
    assert "4 of 6 runs of the study" in text and "too-fast" not in (tmp_path / "table.md").read_text()
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["sapt", "2"], ["single_task", "2"]]
    # Finished runs are recognised.
    ran.clear()
    assert command(config, tmp_path, "--only=sapt/*,single*")[0] == 0 and not ran
    assert "told each input's task" in (tmp_path / "table.txt").read_text()
    assert "\\pm" in (tmp_path / "table.tex").read_text()


@pytest.mark.slow
def test_torn_scores_of_one_run_stop_no_other(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "watch", lambda: None)
    (tmp_path / "sapt/one/seed2").mkdir(parents=True)
    ran = []
    monkeypatch.setattr(continual, "run", lambda config, folder: ran.append(folder.parts[-3:]))
    (planned,) = choose(plan(load_config(str(config))), "sapt/one/seed2", "")
    record_config(planned.config, as_path(tmp_path / planned.name))
    (tmp_path / "sapt/one/seed2/scores.json").write_text('{"format": 1, ')
    code, text = command(config, tmp_path)
    assert code == 0 and len(ran) == 6 and "No run is finished yet" in text


@pytest.mark.slow
def test_a_study_stops_where_it_is_asked_to(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preemption, "watch", lambda: None)

    def stopped(config, folder):
        raise preemption.PreemptedError("after step 3")

    monkeypatch.setattr(continual, "run", stopped)
    assert command(config, tmp_path)[0] == preemption.EXIT_CODE
    assert "stopped after step 3, and saved" in capsys.readouterr().err
