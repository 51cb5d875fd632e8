"""The command line of `python -m sapt_jax.convert`: help, errors in one line, what needs PyTorch."""

import json
import shlex
import sys

import pytest

pytest.importorskip("transformers", reason="base models are written by transformers")

from configs.default import get_config  # noqa: E402
from sapt_jax.config import flatten  # noqa: E402
from sapt_jax.convert.__main__ import main  # noqa: E402
from sapt_jax.storage.text_files import to_jsonable  # noqa: E402
from tests.helpers.learned_runs import TASKS, make_base, make_run  # noqa: E402
from tests.helpers.run_files import assert_same_arrays, committed  # noqa: E402
from tests.helpers.told import error_of  # noqa: E402

COMMANDS = ("to-peft", "to-reference", "from-reference", "to-hf", "to-torch", "from-torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds base and run, of LoRA."""
    made = tmp_path_factory.mktemp("run")
    make_run(made, "t5 square", "lora")
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_parses(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    example = capsys.readouterr().out.split("example:\n")[1]
    words = shlex.split(example)
    assert words[:4] == ["python", "-m", "sapt_jax.convert", command]
    # The example parses, and its files are missed.
    assert any(text in error_of(main, *words[3:]) for text in ("no config.json", "does not exist", "lacks config.json"))


def test_all_commands_are_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(f"  {command}" in told for command in (*COMMANDS, "from-hf", "from-gguf", "from-t5x", "to-t5x"))


@pytest.mark.slow
def test_there_and_back(folder, tmp_path, capsys):
    run = folder / "run"
    main(["to-torch", f"--run={run}", f"--out={tmp_path / 'torch'}"])
    main(["from-torch", f"--model={tmp_path / 'torch'}", f"--out={tmp_path / 'from torch'}"])
    assert_same_arrays(committed(run), committed(tmp_path / "from torch"))
    main(["to-reference", f"--run={run}", f"--out={tmp_path / 'outputs'}"])
    saved = ",".join(str(tmp_path / "outputs" / f"{n}-{task}" / "saved_weights") for n, task in enumerate(TASKS, 1))
    back = tmp_path / "from reference"
    capsys.readouterr()
    main(["from-reference", f"--saved={saved}", f"--base={folder / 'base'}", f"--out={back}"])
    assert_same_arrays(committed(run), committed(back))
    # What it prints is the command that goes on: its flags are all that the recorded settings change.
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert words[:4] == ["python", "-m", "sapt_jax.main", "--config=configs/default.py"]
    assert words[-1] == f"--workdir={back}"
    flags = dict(word.removeprefix("--config.").split("=", 1) for word in words[4:-1])
    recorded, common = json.loads((back / "config.json").read_text()), to_jsonable(flatten(get_config()))
    assert flags == {name: str(value) for name, value in recorded.items() if value != common[name]}
    assert flags["model.path"] == str(folder / "base") and flags["task_order"] == ",".join(TASKS)


@pytest.mark.slow
def test_adapters_and_merged_model(folder, tmp_path):
    main(["to-peft", f"--run={folder / 'run'}", "--all", f"--out={tmp_path / 'all'}"])
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(TASKS)
    main(["to-peft", f"--run={folder / 'run'}", f"--task={TASKS[0]}", f"--out={tmp_path / 'one'}"])
    main(["to-peft", f"--run={folder / 'run'}", "--weights=0.1,0.9,0", f"--out={tmp_path / 'mixture'}"])
    assert json.loads((tmp_path / "mixture" / "adapter_config.json").read_text())["r"] == 6
    main(["to-hf", f"--run={folder / 'run'}", "--weights=0.1,0.9,0", f"--out={tmp_path / 'merged'}"])
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_sum_of_blocks_needs_no_weights(tmp_path):
    _, run = make_run(tmp_path, "llama", "lora", method="inc_lora")
    main(["to-hf", f"--run={run}", f"--out={tmp_path / 'merged'}"])
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    main(["to-peft", f"--run={run}", f"--out={tmp_path / 'sum'}"])
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 6
    main(["to-torch", f"--run={run}", f"--out={tmp_path / 'torch'}"])
    assert json.loads((tmp_path / "torch" / "config.json").read_text())["selection"] == "sum"
    assert "config.method='inc_lora'" in error_of(main, "to-reference", f"--run={run}", f"--out={tmp_path / 'out'}")


@pytest.mark.slow
def test_errors(folder, tmp_path):
    run, out = folder / "run", tmp_path / "out"
    assert "give the --workdir of a run" in error_of(main, "to-torch", f"--run={tmp_path}", f"--out={out}")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((run / "config.json").read_text())
    message = error_of(main, "to-torch", f"--run={tmp_path / 'begun'}", f"--out={out}")
    assert "no committed task yet" in message
    assert "no block of task 'fourth'" in error_of(main, "to-peft", f"--run={run}", "--task=fourth", f"--out={out}")
    assert "sum to 0.8" in error_of(main, "to-peft", f"--run={run}", "--weights=0.1,0.5,0.2", f"--out={out}")
    assert "4 weights for 3 blocks" in error_of(main, "to-hf", f"--run={run}", "--weights=0,0,0,1", f"--out={out}")
    assert "'a,b' is not a list of numbers" in error_of(main, "to-hf", f"--run={run}", "--weights=a,b", f"--out={out}")
    assert "--help shows an example" in error_of(main, "to-peft", f"--run={run}", f"--out={out}")
    assert "--help shows an example" in error_of(main, "to-nowhere")
    make_base("llama", tmp_path / "other")
    message = error_of(main, "to-torch", f"--run={run}", f"--base={tmp_path / 'other'}", f"--out={out}")
    assert f"--base={tmp_path / 'other'} is not the model that this run was trained on" in message
    message = error_of(main, "to-torch", f"--run={run}", f"--base={tmp_path / 'nowhere'}", f"--out={out}")
    assert "nowhere does not exist" in message
    config = json.loads((run / "config.json").read_text())
    for wrong, expected in [
        ({**config, "model.path": str(tmp_path / "gone")}, "--base=PATH says where the base model lies now"),
        ({**config, "method": "sequential", "pet.rnk": 3}, "config.pet.rnk is not a setting"),
        ({**config, "pet.rank": 5}, "not the model that this run was trained on, or the run is damaged"),
    ]:
        (tmp_path / "wrong").mkdir(exist_ok=True)
        (tmp_path / "wrong" / "config.json").write_text(json.dumps(wrong))
        if not (tmp_path / "wrong" / "tasks").exists():
            (tmp_path / "wrong" / "tasks").symlink_to(run / "tasks")
        assert expected in error_of(main, "to-torch", f"--run={tmp_path / 'wrong'}", f"--out={out}")
    reading = ["from-reference", f"--saved={tmp_path}", f"--base={folder / 'base'}", f"--out={out}"]
    assert "none.py does not exist" in error_of(main, *reading, "--config=none.py")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_without_torch(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    run = folder / "run"
    for arguments in (
        ["to-reference", f"--run={run}"],
        ["from-reference", f"--saved={tmp_path}", f"--base={folder / 'base'}"],
    ):
        message = error_of(main, *arguments, f"--out={tmp_path / 'out'}")
        assert f"{arguments[0]} needs PyTorch: pip install torch" in message
    assert not list(tmp_path.glob("out*"))
    main(["to-torch", f"--run={run}", f"--out={tmp_path / 'torch'}"])
    main(["from-torch", f"--model={tmp_path / 'torch'}", f"--out={tmp_path / 'back'}"])
    main(["to-peft", f"--run={run}", "--all", f"--out={tmp_path / 'all'}"])
    main(["to-hf", f"--run={run}", "--weights=1,0,0", f"--out={tmp_path / 'merged'}"])
