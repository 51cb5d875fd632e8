"""Wrong input through the commands themselves, in one process: one message, no traceback, and nothing changed."""

import json
import re
import sys

import pytest
from absl import flags

from sapt_jax import compare, main
from sapt_jax.command_line import load_config, parse_flags, told_in_one_line
from sapt_jax.convert import __main__ as convert
from tests.helpers.tiny import write_tasks

CONFIG = "from tests.helpers.tiny import tiny_config\n\n\ndef get_config():\n    return tiny_config({data!r})\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a config and some broken ones."""
    place = tmp_path_factory.mktemp("place")
    write_tasks(place / "data")
    files = {
        "good": CONFIG.format(data=str(place / "data")),
        "syntax": "def get_config(:\n",
        "without": "config = 3\n",
        "raises": "def get_config():\n    return 1 / 0\n",
        "imports": "import no_such_package\n",
        "leaves": "import sys\nsys.exit(3)\n",
        "returns": "def get_config():\n    return 3\n",
        "empty": "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n",
    }
    for name, text in files.items():
        (place / f"{name}.py").write_text(text)
    (place / "folder.py").mkdir()
    return place


def run(command, *arguments):
    """The exit status of a command that fails on its arguments. Flags are absl's own state, which is put back."""
    module = {"main": main, "convert": convert, "compare": compare}[command]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        if command != "main":
            module.main(list(arguments))
        # Overrides are read from there.
        patch.setattr(sys, "argv", ["main", *arguments])
        before = set(flags.FLAGS)
        try:
            main.main(parse_flags(sys.argv))
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
            for name in ("config", "workdir"):
                flags.FLAGS[name].unparse()
    if isinstance(ended.value.code, str):
        # As Python ends a program then.
        print(ended.value.code, file=sys.stderr)
        return 1
    return ended.value.code


CONFIGS = {
    "nowhere.py": "nowhere.py does not exist",
    "folder.py": "folder.py does not exist",
    "syntax.py": "line 1 of",
    "without.py": "has no function get_config",
    "raises.py": "line 2: ZeroDivisionError: division by zero",
    "imports.py": "line 1: ModuleNotFoundError: No module named 'no_such_package'",
    "leaves.py": "line 2: SystemExit: 3",
    "returns.py": "get_config returns a int, and must return a ConfigDict",
    "good.py:size=xl": "takes no argument",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_faults_in_a_config_file(place, tmp_path, capsys, name):
    address = f"--config={place / name}"
    for command in (("main", address, f"--workdir={tmp_path / 'run'}"), ("convert", "from-reference", address)):
        more = (
            () if command[0] == "main" else (f"--saved={tmp_path}", f"--base={tmp_path}", f"--out={tmp_path / 'run'}")
        )
        assert run(*command, *more) == 1
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith(f"error: {address}: ") and CONFIGS[name] in told.err
        assert told.err.count("\n") == 1 and not (tmp_path / "run").exists()


SETTINGS = {
    "seed=abc": "config.seed='abc' must be of type int",
    "seed=": "config.seed='' must be of type int",
    "seed=-1": "config.seed=-1 must be from 0 to 4294967295",
    "seed=123456789012": "config.seed=123456789012 must be from 0 to 4294967295",
    f"seed={'9' * 5000}": "config.seed='9999",
    "pet.rank=2.5": "config.pet.rank='2.5' must be of type int",
    "pet.rank=0": "config.pet.rank=0 must be positive",
    "data=3": "config.data is a section of settings",
    "data.buckets=64": "config.data.buckets=(64,) must be pairs of positive lengths",
    "data.max_source_length=1": "config.data.max_source_length=1 must be at least 2",
    "data.prefetch_batches=0": "config.data.prefetch_batches=0 must be positive",
    "data.add_bos=maybe": "config.data.add_bos='maybe' must be of type bool",
    "pseudo_samples.ratio=inf": "config.pseudo_samples.ratio=inf must be not negative",
    "optimizer.learning_rate=inf": "config.optimizer.learning_rate=inf must be not negative",
    "optimizer.learning_rate=nan": "config.optimizer.learning_rate=nan must be not negative",
    "sapt.warm_start_learning_rate=nan": "config.sapt.warm_start_learning_rate=nan must be positive",
    "sapt.query_init_std=-1": "config.sapt.query_init_std=-1.0 must be positive",
    "eval.length_penalty=nan": "config.eval.length_penalty=nan must be a finite number",
    "eval.beams=1000": "config.eval.beams=1000 must be at most 192",
    "data_source=cl_bench": "config.data_source='cl_bench' is unknown; choose one of cl_benchmark, ",
    "benchmark=none": "config.benchmark='none' is unknown; choose one of superni, ",
    "task_order=../data/shout": "config.task_order='../data/shout': '../data/shout' holds a slash",
    "task_order=glue/sst2": "config.task_order='glue/sst2': 'glue/sst2' holds a slash",
    "task_order=": "config.task_order='' is empty",
    "eval.unseen_tasks=../x": "config.eval.unseen_tasks='../x': '../x' holds a slash",
    "optimizer.key_learning_rate=nan": "config.optimizer.key_learning_rate is not a setting",
    "data.on_long_target=error": "is over config.data.max_target_length=4",
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[:40])
def test_wrong_values_of_settings(place, tmp_path, capsys, setting):
    more = ["--config.data.max_target_length=4"] if "long_target" in setting else []
    arguments = [f"--config={place / 'good.py'}", f"--workdir={tmp_path / 'run'}", f"--config.{setting}", *more]
    assert run("main", *arguments) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and SETTINGS[setting] in told.err, told.err
    assert len(told.err) < 400 and told.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_wrong_arguments(place, tmp_path, capsys):
    config, workdir = f"--config={place / 'good.py'}", f"--workdir={tmp_path / 'run'}"
    for arguments, message in (
        ((config,), "--workdir is missing"),
        ((workdir,), "--config is missing"),
        ((config, "--workdir="), "the path of a folder is empty"),
        ((config, workdir, "--nonsense=3"), "Unknown command line flag 'nonsense'"),
        ((config, workdir, "extra"), "unexpected arguments: extra"),
        ((config, "--workdir=ftp://x/y"), "ftp://x/y: choose a local folder"),
        ((f"--config={place / 'empty.py'}", workdir), "config.seed is missing"),
    ):
        assert run("main", *arguments) == 1
        told = capsys.readouterr()
        assert told.err.startswith("error: ") and message in told.err and "Traceback" not in told.err
        assert not (tmp_path / "run").exists()


def test_files_of_other_commands(tmp_path, capsys):
    broken = {"empty": b"", "text": b"nothing", "list": b"[]", "bytes": b"\xff\xfe", "deep": b"[" * 100_000}
    for name, content in broken.items():
        (tmp_path / name).mkdir()
        for file in ("scores.json", "config.json", "model.safetensors", "run.safetensors"):
            (tmp_path / name / file).write_bytes(content)
        assert run("compare", str(tmp_path / name), str(tmp_path / name)) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"sapt_jax.compare: {tmp_path / name / 'scores.json'} ") and told.count("\n") == 1
        out = f"--out={tmp_path / 'out'}"
        for command in (
            ("to-peft", f"--run={tmp_path / name}", "--all", out),
            ("from-torch", f"--model={tmp_path}", out),
        ):
            assert run("convert", *command) == 1
            told = capsys.readouterr().err
            assert told.startswith("error: ") and str(tmp_path) in told and told.count("\n") == 1, told
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(broken)


def test_an_internal_error_keeps_its_traceback_and_asks_for_a_report():
    def fails(error):
        with told_in_one_line():
            raise error

    with pytest.raises(ZeroDivisionError) as raised:
        fails(ZeroDivisionError("x"))
    assert "report" in raised.value.__notes__[0]
    # What a library says of our own mistake is no message to a user.
    with pytest.raises(ValueError) as raised, told_in_one_line():
        json.loads("{")
    assert raised.value.__notes__
    for error in (OSError(28, "No space left on device"), FloatingPointError("step 3")):
        with pytest.raises(SystemExit, match=re.escape(f"error: {error}")):
            fails(error)
    with pytest.raises(FileNotFoundError), told_in_one_line(verbose=True):
        load_config("nowhere.py")
