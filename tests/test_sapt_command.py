"""The one command: it names what there is, and hands the rest to the program that it names."""

import importlib.util
import subprocess
import sys

import pytest

from sapt_jax import __main__ as sapt
from tests.helpers.paths import REPOSITORY

NAMES = ("train", "study", "predict", "serve", "report", "compare", "inspect", "convert", "check")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_has_every_command_with_an_example(arguments, capsys):
    assert sapt.main(arguments) == 0
    printed = capsys.readouterr().out
    assert tuple(sapt.COMMANDS) == NAMES
    assert all(f"  sapt {name} " in printed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_a_program_of_its_own(name):
    module, *_ = sapt.COMMANDS[name]
    spec = importlib.util.find_spec(module)
    # A package is run by its __main__.
    spec = importlib.util.find_spec(f"{module}.__main__") if spec.submodule_search_locations else spec
    with open(spec.origin) as source:
        assert '\nif __name__ == "__main__":\n' in source.read()


def test_an_unknown_command_is_told_with_the_nearest(capsys):
    assert sapt.main(["comparee", "a"]) == 2
    printed = capsys.readouterr()
    assert (
        printed.err == "sapt: there is no command 'comparee'. The nearest known name is 'compare'.\n"
        and not printed.out
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["compare", "nowhere"], 2, "sapt_jax.compare: nowhere"),
        (["train", "--config=configs/methods.py:name=o_lora,of=t5_tiny"], 1, "error: --workdir is missing"),
    ],
)
def test_the_rest_goes_to_the_program(arguments, code, told):
    # A script has its own folder on the path, and not the one that it is called in.
    script = "import sys; sys.path.remove(''); from sapt_jax.__main__ import main; sys.exit(main())"
    program = [sys.executable, "-c", script, *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.startswith(told) and len(ended.stderr.splitlines()) == 1, ended.stderr
