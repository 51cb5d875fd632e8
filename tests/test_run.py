"""What a run is built from."""

import dataclasses

import pytest

from sapt_jax import run as run_module
from sapt_jax.run import read_inputs
from tests.helpers.tiny import tiny_config, write_tasks


def test_padding_may_be_the_beginning_token(tmp_path, monkeypatch):
    config = tiny_config(write_tasks(tmp_path / "data"))
    _, plain, _ = read_inputs(config)
    config.data.pad_with_bos = True
    with pytest.raises(ValueError, match="config.data.pad_with_bos: the tokenizer has no beginning token; set it to"):
        read_inputs(config)
    load = run_module.load_tokenizer
    monkeypatch.setattr(run_module, "load_tokenizer", lambda path: dataclasses.replace(load(path), bos_id=2))
    _, padded, _ = read_inputs(config)
    assert plain.pad_id != 2 and padded.pad_id == 2
