"""What is installed: pins within the ranges, every import declared, one package in the wheel."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Imported where they are needed, with an error that says what to install.
OPTIONAL = {"torch", "pyarrow"}


def pins(name):
    """Package -> the pinned requirement; a package pinned twice is an error."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith(("#", "-")):
            requirement = Requirement(line)
            key = canonicalize_name(requirement.name)
            assert key not in found, f"{name} names {key} twice"
            found[key] = requirement
    return found


def declared():
    ranges = map(Requirement, PROJECT["project"]["dependencies"])
    return {canonicalize_name(requirement.name): requirement for requirement in ranges}


def test_requirements_pin_what_the_project_depends_on_within_its_ranges():
    pinned = pins("requirements.txt")
    assert pinned.keys() == declared().keys()
    for name, requirement in pinned.items():
        (exact,) = requirement.specifier
        assert exact.operator == "==" and exact.version in declared()[name].specifier, name


def test_the_tests_pin_nothing_twice():
    assert "-r requirements.txt" in (ROOT / "requirements-test.txt").read_text().splitlines()
    assert not pins("requirements.txt").keys() & pins("requirements-test.txt").keys()


@pytest.mark.slow
def test_every_import_is_declared():
    distributions, undeclared = packages_distributions(), set()
    for file in (ROOT / "sapt_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - OPTIONAL:
                owners = {canonicalize_name(owner) for owner in distributions.get(top, ())}
                if not (ROOT / top).is_dir() and not owners & declared().keys():
                    undeclared.add((top, file.name))
    assert not undeclared


@pytest.mark.slow
def test_starting_a_run_imports_nothing_that_takes_seconds():
    slow = {"matplotlib", "nltk", "scipy.stats", "tensorflow_datasets", "torch", "transformers"}
    code = f"import sys, sapt_jax.main; print(*{slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stdout.split()


def test_the_wheel_holds_one_package():
    chosen = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = find_namespace_packages(str(ROOT), include=chosen)
    assert "sapt_jax.data.sources" in packages
    assert {re.split(r"\.", package)[0] for package in packages} == {"sapt_jax"}
