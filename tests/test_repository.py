"""Facts that stand in more than one file of the repository agree."""

import re
import subprocess
import sys
import tomllib

import yaml

import sapt_jax
from tests.helpers.paths import REPOSITORY


def _requirement(name):
    text = (REPOSITORY / "requirements-test.txt").read_text()
    return re.search(rf"^{name}==(\S+)$", text, re.MULTILINE)[1]


def test_pre_commit_runs_the_ruff_of_the_tests():
    (hooks,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{_requirement('ruff')}"


def test_the_version_is_one():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sapt_jax.__version__"}
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == sapt_jax.__version__
    released = re.findall(r"^## \[(\d\S*)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == sapt_jax.__version__


def test_the_version_is_read_without_jax():
    code = "import sapt_jax, sys; assert sapt_jax.__version__; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_the_readme_names_files_that_exist():
    text = (REPOSITORY / "README.md").read_text()
    names = set(re.findall(r"(?<![\w/])(?:sapt_jax|configs|benchmarks|launch)/[\w./]*\w", text))
    assert len(names) > 10
    assert sorted(name for name in names if not (REPOSITORY / name).exists()) == []
