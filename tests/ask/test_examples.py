"""The examples of docs/asking.md and of the docstrings run, on a run that lies where they say."""

import doctest
import re
import shutil

import pytest

import sapt_jax
from sapt_jax.ask import model as module
from tests.helpers.paths import REPOSITORY

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs/asking.md").read_text(encoding="utf-8")


def examples(kind):
    return "\n".join(re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def at_home(asked_copy, monkeypatch):
    """A folder with runs/mine in it."""
    (asked_copy.parent / "runs").mkdir()
    shutil.move(asked_copy, asked_copy.parent / "runs/mine")
    monkeypatch.chdir(asked_copy.parent)


def test_the_python_of_the_page_runs(at_home):
    names = {}
    exec(examples("python"), names)
    assert names["weights"].shape == (2, 3) and "mirror" not in names["less"].tasks
    exec(examples("python slow"), names)
    names["model"].to_torch("exported")
    assert names["model"].tasks[-1] == "last"


def test_the_examples_of_docstrings_run(at_home):
    names = {"model": sapt_jax.load("runs/mine")}
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, globs={**vars(module), **names})
    runner = doctest.DocTestRunner()
    tried = sum(runner.run(test).attempted for test in tests if test.examples)
    assert tried >= 10 and runner.summarize().failed == 0
