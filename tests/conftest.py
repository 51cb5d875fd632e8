"""Settings of the whole suite; they have to stand before JAX is imported."""

import os
import re
import shutil

import pytest

from tests.helpers.paths import REPOSITORY

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of tiny programs that run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What an earlier run or the other worker has compiled is read back; interpreters that the tests start inherit this.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_ignore_collect(collection_path, config):
    """Without the slow tests, a file of nothing else is not even imported: PyTorch alone takes seconds."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return bool(re.search(r"^pytestmark = pytest\.mark\.slow$", collection_path.read_text(), re.MULTILINE)) or None
    return None


@pytest.fixture(scope="session")
def asked_run(tmp_path_factory):
    """The workdir of a finished run of three tasks, whose model says something different to each input; read only."""
    # Imported on use: a LLaMA of transformers is its base.
    from tests.helpers.asked_runs import finish_run

    return finish_run(tmp_path_factory.mktemp("asked"))


@pytest.fixture
def asked_copy(asked_run, tmp_path):
    """A copy of it to write into."""
    return shutil.copytree(asked_run, tmp_path / "run")
