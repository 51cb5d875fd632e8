"""How the house is built, read off its sources: few arguments, no import upwards, small files, no name of a library."""

import ast
import sys

import pytest

from tests.helpers.paths import REPOSITORY

FOLDERS = ("sapt_jax", "benchmarks", "configs", "tests")
SOURCES = {
    file.relative_to(REPOSITORY): ast.parse(file.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for file in sorted((REPOSITORY / folder).rglob("*.py"))
}
OWN = {path: tree for path, tree in SOURCES.items() if path.parts[0] == "sapt_jax"}

MOST_ARGUMENTS, MOST_LINES = 5, 400

# Functions that run under jit: a hook or a layer takes what its formula names.
TRACED = (
    "sapt_jax/methods/",
    "sapt_jax/decoding/",
    "sapt_jax/models/kernels.py",
    "sapt_jax/models/llama.py",
    "sapt_jax/models/t5.py",
)

# Modules and packages by layer, the highest first. A module imports from its own layer and those below.
LAYERS = (
    ("main", "compare"),
    ("continual",),
    ("tell", "fit", "evaluation", "contents", "run", "pseudo_samples"),
    ("programs", "config", "recorded_config", "command_line", "passes"),
    ("methods", "decoding", "results"),
    ("models", "pretrained", "data"),
    ("pet",),
    ("state", "sharding", "settings", "storage", "optimization"),
)
# These stand on everything; nothing but themselves imports them.
ON_TOP = ("export", "convert", "tools", "report", "ask", "predict", "serve", "study", "__main__")


def part_of(module):
    """The name that a module of the package has in the tables: of sapt_jax.data.stream it is "data"."""
    inside = module.removeprefix("sapt_jax").lstrip(".")
    named = [*ON_TOP, *(name for layer in LAYERS for name in layer)]
    found = [name for name in named if f"{inside}.".startswith(f"{name}.")]
    return max(found, key=len, default=inside)


def module_of(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in OWN}


def imports_of(tree):
    """Every module that a source imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name their module in full"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in whole)


def runs_upwards(importer, imported):
    """Whether one part of the package may not import another."""
    # The package's own file hands out what it imports on use.
    if importer in ("", *ON_TOP) or importer == imported:
        return False
    if imported in ON_TOP:
        return True
    depth = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    return depth[importer] > depth[imported]


def argument_names(function):
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_function_of_the_host_takes_more_than_five_arguments():
    functions = [
        (path, node)
        for path, tree in SOURCES.items()
        if path.parts[0] != "tests" and not path.as_posix().startswith(TRACED)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    assert len(functions) > 300
    assert [f"{path}:{node.lineno}" for path, node in functions if len(argument_names(node)) > MOST_ARGUMENTS] == []


@pytest.mark.parametrize("traced", TRACED)
def test_every_exception_is_needed(traced):
    own = [tree for path, tree in OWN.items() if path.as_posix().startswith(traced)]
    functions = [node for tree in own for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert any(len(argument_names(node)) > MOST_ARGUMENTS for node in functions)


def test_every_module_has_a_place():
    placed = [name for layer in LAYERS for name in layer] + list(ON_TOP)
    assert len(placed) == len(set(placed))
    parts = {part_of(module) for module in MODULES} - {""}
    assert parts == set(placed)


def test_no_import_runs_upwards():
    pairs = {(module_of(path), name) for path, tree in OWN.items() for name in imports_of(tree)}
    inside = [(one, other) for one, other in pairs if other in MODULES and other != "sapt_jax"]
    assert len(inside) > 200
    assert sorted(f"{one} imports {other}" for one, other in inside if runs_upwards(part_of(one), part_of(other))) == []


def test_layers_tell_up_from_down():
    assert runs_upwards("storage", "programs") and not runs_upwards("programs", "storage")
    assert runs_upwards("main", "tools") and not runs_upwards("tools", "main")
    assert not runs_upwards("fit", "run")
    assert part_of("sapt_jax.report.page") == "report" != part_of("sapt_jax.results.scores")


def test_no_file_is_long():
    lengths = {path: len((REPOSITORY / path).read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


@pytest.mark.slow
def test_no_file_is_named_like_a_library():
    """A script's folder comes first where imports are looked for, and one name with two meanings misleads a reader."""
    imported = {name.split(".")[0] for tree in SOURCES.values() for name in imports_of(tree)}
    assert {"jax", "flax", "tokenizers", "grain"} <= imported
    libraries = (imported | set(sys.stdlib_module_names)) - set(FOLDERS)
    names = {path: path.stem if path.stem != "__init__" else path.parent.name for path in SOURCES}
    dunder = {"__main__"}
    assert sorted(str(path) for path, name in names.items() if name in libraries - dunder) == []
