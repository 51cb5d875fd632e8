"""What a user can get wrong gives one message that names the culprit and what to do, before anything is written."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from sapt_jax import continual
from sapt_jax.config import make_method
from sapt_jax.models.families import make_model
from sapt_jax.models.shapes import LLAMA_VARIANTS
from sapt_jax.recorded_config import record_config
from sapt_jax.storage import checkpoints, task_folders
from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.tiny_tokenizers import byte_level, train_bpe
from tests.helpers.trees import empty_frozen, fresh


@pytest.fixture
def data_dir(tmp_path):
    return write_tasks(tmp_path / "data")


def message_of(config, workdir):
    """The error of a run that `main` turns into one message."""
    before = sorted(workdir.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        continual.run(config, workdir)
    assert sorted(workdir.rglob("*")) == before, "a run that cannot start has changed its workdir"
    return str(error.value)


def test_bad_config_field(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.optimizer.learning_rat = 0.1
    message = message_of(config, tmp_path / "run")
    assert message == ("config.optimizer.learning_rat is not a setting. Did you mean config.optimizer.learning_rate?")


def test_missing_data_folder(data_dir, tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    message = message_of(tiny_config(nowhere), tmp_path / "run")
    assert str(nowhere) in message and "config.data_dir" in message and "Set it to one that does" in message
    monkeypatch.delenv("SAPT_DATA_DIR", raising=False)
    message = message_of(tiny_config(""), tmp_path / "run")
    assert "set config.data_dir or the environment variable SAPT_DATA_DIR" in message


def test_unknown_task(data_dir, tmp_path):
    message = message_of(tiny_config(data_dir, task_order="shout,miror"), tmp_path / "run")
    assert f"unknown task 'miror': {data_dir} has no such folder" in message and "'mirror'" in message


def test_broken_json_line(data_dir, tmp_path):
    file = data_dir / "mirror" / "test.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2][:-1]
    file.write_text("\n".join(lines))
    message = message_of(tiny_config(data_dir), tmp_path / "run")
    assert f"{file}: line 3" in message and "Mend the row" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_task(split, data_dir, tmp_path):
    (data_dir / "mirror" / f"{split}.jsonl").write_text("\n")
    message = message_of(tiny_config(data_dir), tmp_path / "run")
    assert f"mirror: its {split} split is empty" in message and "take the task out of config.task_order" in message


def test_no_model(data_dir, tmp_path):
    message = message_of(tiny_config(data_dir, **{"model.variant": ""}), tmp_path / "run")
    assert message.startswith("config.model.path is empty and config.model.variant='' is not one of llama-tiny, ")
    message = message_of(tiny_config(data_dir, **{"model.tokenizer": ""}), tmp_path / "run")
    assert message.startswith('config.model.tokenizer is empty: name one, or "bytes"')


def make_state(config, shape):
    """What a run on a model of another shape would have committed after its first task."""
    model, method = make_model(shape, "float32", "none"), make_method(config)
    base = {"token_embedder": {"embedding": np.zeros((9, shape.d_model))}}
    return empty_frozen(method, model, base, 3), fresh(method, model, base, 0)


def test_a_run_of_another_model(data_dir, tmp_path):
    record_config(tiny_config(data_dir, **{"model.variant": "smollm2-135m"}), tmp_path / "run")
    message = message_of(tiny_config(data_dir), tmp_path / "run")
    assert str(tmp_path / "run") in message and "Use a new --workdir" in message
    assert "config.model.variant: 'smollm2-135m' before, 'llama-tiny' now" in message


@pytest.mark.slow
def test_a_checkpoint_of_another_model(data_dir, tmp_path):
    config = tiny_config(data_dir)
    record_config(config, tmp_path / "run")
    folder = task_folders.task_folder(tmp_path / "run", 0, "shout")
    checkpoints.save_committed(
        folder, *make_state(config, dataclasses.replace(LLAMA_VARIANTS["llama-tiny"], d_model=16))
    )
    with pytest.raises(ValueError) as error:
        continual.run(config, tmp_path / "run")
    message = str(error.value)
    assert str(folder / "committed") in message and "Use the config that wrote it, or a new --workdir" in message
    assert "['memory']['keys']: the checkpoint has float32[3, 16], this run float32[3, 32]" in message
    leaf = "['bank']['decoder']['layers']['self_attention']['query']['a']"
    assert f"{leaf}: the checkpoint has float32[2, 16, 3, 2]" in message


def test_weights_of_another_model(data_dir, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    weights = {"model.embed_tokens.weight": np.zeros((300, 8), np.float32), "h.0.attn": np.zeros(3, np.float32)}
    save_file(weights, folder / "model.safetensors")
    message = message_of(tiny_config(data_dir, **{"model.path": str(folder)}), tmp_path / "run")
    for culprit in (str(folder), "h.0.attn", "model.norm.weight", "(300, 8)", "(300, 16)"):
        assert culprit in message
    (folder / "config.json").write_text(json.dumps({**shape, "model_type": "gpt2"}))
    message = message_of(tiny_config(data_dir, **{"model.path": str(folder)}), tmp_path / "run")
    assert f"config.model.path={folder}: model_type 'gpt2' is not supported; name a checkpoint of llama, " in message


def run_main(*arguments):
    command = [sys.executable, "-m", "sapt_jax.main", *arguments]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_main_prints_one_message_and_exits_with_1(data_dir, tmp_path):
    (data_dir / "mirror" / "train.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a"\n')
    file = tmp_path / "config.py"
    file.write_text(
        "from tests.helpers.tiny import tiny_config\n\n\n"
        f"def get_config():\n    return tiny_config({str(data_dir)!r})\n"
    )
    run = f"--workdir={tmp_path / 'run'}"
    for arguments, message in (
        ([f"--config={file}", run], f"{data_dir / 'mirror' / 'train.jsonl'}: line 2: malformed JSON"),
        ([f"--config={file}", run, "--config.train.epocks=3"], "config.train.epocks is not a setting. Did you mean"),
        ([f"--config={tmp_path / 'none.py'}", run], f"{tmp_path / 'none.py'}"),
    ):
        done = run_main(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == "" and not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_fit_the_embedding(data_dir, tmp_path):
    model = train_bpe(byte_level(use_regex=True))
    model.add_tokens([f"<{number}>" for number in range(200)])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    config = tiny_config(data_dir, **{"model.tokenizer": str(tmp_path / "tokenizer.json")})
    message = message_of(config, tmp_path / "run")
    assert f"the tokenizer has {model.get_vocab_size()} ids, the model's embedding 384 rows" in message
    assert "config.model.tokenizer" in message
