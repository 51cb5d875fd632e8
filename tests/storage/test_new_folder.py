"""A folder is there whole or not at all, and its files are as open as it is."""

import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from sapt_jax.storage.new_folder import new_folder


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        save_file({"x": np.zeros(2)}, folder / "inner" / "x.safetensors")
        folder.chmod(0o750)
    assert stat.S_IMODE((tmp_path / "out" / "inner" / "x.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "out" / "inner").stat().st_mode) & 0o100


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="choose another folder"), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
