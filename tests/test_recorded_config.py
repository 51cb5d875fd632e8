"""What a run has recorded of itself: broken or gone, and places that may change when what lies there is the same."""

import json
import shutil

import pytest

from sapt_jax.config import default_config
from sapt_jax.recorded_config import (
    check_same_contents,
    check_same_run,
    read_recorded,
    record_config,
    record_contents,
    upgrade,
)
from sapt_jax.results.scores import Scores, write_scores
from sapt_jax.storage.task_folders import task_folder


def changed(**changes):
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("content", [b"", b"nothing", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"a": 1', None])
def test_broken_settings_are_named_with_what_to_do(tmp_path, content):
    file = tmp_path / "config.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="Put a whole copy back; where there is a scores.json, delete it") as error:
        check_same_run(default_config(), tmp_path)
    message = str(error.value)
    assert message.startswith(f"{file} ") and "\n" not in message and len(message) < 400


def test_settings_that_are_gone(tmp_path):
    assert read_recorded(tmp_path) is None
    (tmp_path / "tasks" / "my-notes").mkdir(parents=True)
    assert read_recorded(tmp_path) is None
    (task_folder(tmp_path, 0, "first") / "steps").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds 00-first of a run, but neither config.json nor scores.json"):
        check_same_run(default_config(), tmp_path)
    # scores.json has them too.
    parts = (("first",), {"first": "rouge_l"}, [[40.0]], {"AP": 40.0}, {}, {}, changed(**{"pet.rank": 3}))
    write_scores(tmp_path, Scores("sapt", *parts))
    check_same_run(changed(**{"pet.rank": 3}), tmp_path)
    with pytest.raises(ValueError, match="config.pet.rank: 3 before, 4 now"):
        check_same_run(default_config(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_values_of_an_older_run_that_make_no_sense_are_differences(tmp_path):
    for value in ("x", [1], {}):
        for before in ({"optimizer.key_learning_rate": value}, {"optimizer.learning_rate": value}, {"seed": value}):
            upgraded = upgrade({"optimizer.key_learning_rate": 1e-3, **before})
            (tmp_path / "config.json").write_text(json.dumps(before))
            assert upgraded["method"] == "sapt"
            with pytest.raises(ValueError, match="holds a run with other settings"):
                check_same_run(default_config(), tmp_path)


def test_a_place_may_change_where_its_fingerprint_is_known(tmp_path):
    begun = changed(**{"model.path": "here", "pseudo_samples.dir": "pools", "seed": 7})
    moved = changed(**{"model.path": "./there", "pseudo_samples.dir": "other", "seed": 7})
    record_config(begun, tmp_path)
    with pytest.raises(ValueError, match="model.path: 'here' before, './there' now\n  config.pseudo_samples.dir"):
        check_same_run(moved, tmp_path)
    contents = {"model.path": "a", "model.tokenizer": "b", "pseudo_samples.dir": {"first": "c", "second": "d"}}
    record_contents(contents, tmp_path)
    check_same_run(moved, tmp_path)
    # Of a longer order, those tasks that both have are compared.
    check_same_contents({**contents, "pseudo_samples.dir": {"second": "d", "third": "e"}}, moved, tmp_path)
    for other, name in (
        ({**contents, "model.path": "x"}, "model.path='./there'"),
        ({**contents, "model.tokenizer": "x"}, "model.tokenizer=''"),
        ({**contents, "pseudo_samples.dir": {"first": "x"}}, "pseudo_samples.dir='other'"),
        ({"model.tokenizer": "b", "pseudo_samples.dir": {}}, "model.path='./there'"),
    ):
        with pytest.raises(ValueError) as error:
            check_same_contents(other, moved, tmp_path)
        lines = str(error.value).split("\n")
        assert str(tmp_path) in lines[0] and lines[1:] == [f"  config.{name} is not what this run began with"]
    (tmp_path / "contents.json").write_text("[]")
    with pytest.raises(ValueError, match="contents.json holds a JSON list"):
        check_same_run(moved, tmp_path)
    (tmp_path / "contents.json").unlink()
    shutil.rmtree(tmp_path)
    check_same_contents(contents, moved, tmp_path)
