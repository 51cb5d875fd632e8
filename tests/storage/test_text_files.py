import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.storage.text_files import to_jsonable, write_text_atomically


def test_to_jsonable_reads_back_and_turns_nan_into_null():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 3))
    value = {
        "matrix": matrix,
        "device": jnp.arange(3),
        "nothing": [np.nan, float("inf"), np.float32(-np.inf), None],
        "scalars": (np.int32(3), np.bool_(True), 7, "x"),
        Path("a"): Path("b/c"),
        "set": {"b", "a"},
    }
    back = json.loads(json.dumps(to_jsonable(value), allow_nan=False))
    np.testing.assert_array_equal(back["matrix"], matrix)
    assert back["device"] == [0, 1, 2]
    assert back["nothing"] == [None] * 4
    assert back["scalars"] == [3, True, 7, "x"]
    assert back["a"] == "b/c"
    assert back["set"] == ["a", "b"]


def test_to_jsonable_names_what_it_cannot_write():
    with pytest.raises(TypeError, match="object"):
        to_jsonable({"x": object()})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    write_text_atomically(path, "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
