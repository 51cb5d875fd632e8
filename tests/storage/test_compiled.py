"""Where compiled programs are kept, and that a second process reads what the first has compiled."""

import os
import subprocess
import sys

import pytest

from sapt_jax.storage.compiled import _machine
from tests.helpers.paths import REPOSITORY

CODE = """
import sys
import jax
import jax.numpy as jnp
from jax._src import monitoring
from sapt_jax.storage.compiled import keep_programs
found = []
monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: x - 1)(jnp.ones(2))
for where in sys.argv[1:]:
    keep_programs(where)
    jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3))
    print(jax.config.jax_compilation_cache_dir, found.count("/jax/compilation_cache/cache_hits"))
"""


def run(*where, **environment):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    command = [sys.executable, "-c", CODE, *where]
    environment = {**known, "JAX_PLATFORMS": "cpu", **environment}
    out = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout
    return [line.split() for line in out.splitlines()]


@pytest.mark.slow
def test_what_one_process_has_compiled_another_reads(tmp_path):
    folder = str(tmp_path / "sapt_jax" / _machine())
    # Also where the process has compiled something before it was told of the folder.
    (first,) = run("auto", XDG_CACHE_HOME=str(tmp_path))
    assert first == [folder, "0"] and os.listdir(folder)
    (second,) = run("auto", HOME=str(tmp_path / "nobody"), XDG_CACHE_HOME=str(tmp_path))
    assert second[0] == folder and int(second[1]) > 0


@pytest.mark.slow
def test_a_choice_made_elsewhere_and_nowhere_count(tmp_path):
    told = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "told")}
    own = str(tmp_path / "own")
    assert [line[0] for line in run("auto", own, "", **told)] == [told["JAX_COMPILATION_CACHE_DIR"], own, "None"]
