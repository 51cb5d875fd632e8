"""Checks of a config: every field at fault is named in one error, and a run goes on with its own settings only."""

import json

import pytest
from ml_collections import ConfigDict

from configs import common, demo, smollm2_superni
from sapt_jax import config as checks
from sapt_jax.config import check_config, check_same_run, flatten, record_config, unknown_fields


def changed(**changes) -> ConfigDict:
    config = common.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("module", [common, demo, smollm2_superni], ids=lambda module: module.__name__)
def test_the_configs_pass(module):
    check_config(module.get_config())


def test_a_field_that_does_not_exist_is_named_with_the_nearest():
    config = common.get_config()
    config.train.epocks = 3
    config.optimiser = ConfigDict({"learning_rate": 1e-3})
    with pytest.raises(ValueError) as error:
        check_config(config)
    assert str(error.value).splitlines() == [
        "config.optimiser.learning_rate is not a setting. Did you mean config.optimizer.learning_rate?",
        "config.train.epocks is not a setting. Did you mean config.train.epochs?",
    ]
    assert unknown_fields(["train.epochs", "zzz"]) == ["config.zzz is not a setting."]


def test_a_missing_field_is_named():
    config = common.get_config()
    del config.eval.batch_size
    with pytest.raises(ValueError, match="config.eval.batch_size is missing; configs/common.py has it"):
        check_config(config)


@pytest.mark.parametrize(("names", "least"), [(checks.POSITIVE, 1), (checks.NOT_NEGATIVE, 0)])
def test_a_value_out_of_range_is_named(names, least):
    fields = flatten(common.get_config())
    for name in names:
        lowest = type(fields[name])(least)
        check_config(changed(**{name: lowest, "train.accumulation": 1}))
        with pytest.raises(ValueError, match=f"config.{name}={lowest - 1} must be (positive|not negative)"):
            check_config(changed(**{name: lowest - 1}))
        with pytest.raises(ValueError, match=f"config.{name}=None must be"):
            check_config(changed(**{name: None}))


@pytest.mark.parametrize("name", checks.CHOICES)
def test_an_unknown_choice_is_named_with_those_there_are(name):
    for choice in checks.CHOICES[name]:
        check_config(changed(**{name: choice}))
    with pytest.raises(ValueError) as error:
        check_config(changed(**{name: "sideways"}))
    assert f"config.{name}='sideways' is unknown; choose one of {checks.CHOICES[name][0]}, " in str(error.value)


def test_all_faults_are_in_one_error():
    config = changed(**{"train.epochs": 0, "pet.rank": -4, "data.dev_size": -1, "optimizer.schedule": "wave"})
    config.seeed = 1
    with pytest.raises(ValueError) as error:
        check_config(config)
    for name in ("train.epochs=0", "pet.rank=-4", "data.dev_size=-1", "optimizer.schedule='wave'", "seeed"):
        assert f"config.{name} " in str(error.value)


def test_a_batch_that_does_not_split_into_its_parts_is_named():
    check_config(changed(**{"train.batch_size": 12, "train.accumulation": 4}))
    message = "config.train.batch_size=12 is not a multiple of config.train.accumulation=5"
    with pytest.raises(ValueError, match=message):
        check_config(changed(**{"train.batch_size": 12, "train.accumulation": 5}))


def test_a_run_records_its_config_and_goes_on_with_the_same(tmp_path):
    record_config(changed(seed=7), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded == {**flatten(common.get_config()), "data.buckets": [], "mesh.rules": [], "seed": 7}
    check_same_run(changed(seed=7), tmp_path / "run")


def test_settings_that_differ_are_all_listed_and_change_nothing(tmp_path):
    record_config(common.get_config(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        check_same_run(changed(**{"seed": 7, "optimizer.key_learning_rate": 0.5, "data_dir": "other"}), tmp_path)
    lines = str(error.value).splitlines()
    assert str(tmp_path) in lines[0] and "new --workdir" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "config.optimizer.key_learning_rate: None before, 0.5 now",
        "config.seed: 42 before, 7 now",
    ]
    assert (tmp_path / "config.json").read_text() == before


def test_every_field_but_the_free_ones_is_compared(tmp_path):
    fields = flatten(common.get_config())
    other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 0.5, str: lambda x: x + "x"}
    other |= {tuple: lambda x: ((8, 4),), type(None): lambda x: 0.5}
    assert set(checks.FREE_ON_RESUME) <= fields.keys()
    for number, (name, value) in enumerate(fields.items()):
        workdir = tmp_path / str(number)
        record_config(common.get_config(), workdir)
        config = changed(**{name: True if name == "data.add_bos" else other[type(value)](value)})
        if name in checks.FREE_ON_RESUME:
            check_same_run(config, workdir)
        else:
            with pytest.raises(ValueError, match=f"config.{name}: "):
                check_same_run(config, workdir)
