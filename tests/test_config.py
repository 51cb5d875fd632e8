"""The settings: every fault is named in one error, old runs are understood, and a run goes on with its own only."""

import json
import math

import pytest
from ml_collections import ConfigDict

from configs import demo, smollm2_superni
from sapt_jax.config import (
    SETTINGS,
    check_config,
    default_config,
    flatten,
    make_method,
    protocol_of,
    unknown_fields,
)
from sapt_jax.methods import METHODS
from sapt_jax.recorded_config import check_same_run, record_config, upgrade
from sapt_jax.settings import NOT_NEGATIVE, POSITIVE, Range, Setting

POSITIVE_SETTINGS = (
    "pet.rank", "pet.alpha", "pet.prompt_length", "sapt.query_hidden", "sapt.temperature", "sapt.reflection_batch",
    "sapt.warm_start_learning_rate", "pseudo_samples.writer.rank", "pseudo_samples.writer.alpha",
    "pseudo_samples.writer.steps", "pseudo_samples.writer.batch_size", "pseudo_samples.writer.max_length",
    "pseudo_samples.writer.temperature", "pseudo_samples.writer.draws", "pseudo_samples.statistics_rank",
    "data.prefetch_batches", "data.max_buckets", "data.source_multiple",
    "data.target_multiple", "train.epochs", "train.batch_size", "train.accumulation", "train.eval_every_epochs",
    "train.log_every_steps", "optimizer.max_grad_norm", "eval.batch_size", "eval.max_new_tokens", "eval.beams",
)  # fmt: skip
NOT_NEGATIVE_SETTINGS = (
    "sapt.kl_ratio", "sapt.warm_start_steps", "sapt.young_steps", "pet.capacity",
    "pseudo_samples.ratio", "pseudo_samples.minimum",
    "data.dev_size", "data.max_train", "data.max_dev", "data.max_test", "data.prefetch_threads",
    "train.max_steps", "train.patience", "train.checkpoint_every_steps",
    "optimizer.learning_rate", "optimizer.warmup_steps", "pseudo_samples.writer.learning_rate",
    "pseudo_samples.writer.top_k",
)  # fmt: skip
CHOICES = {
    "pseudo_samples.source": ("generate", "statistics", "files", "train", "none"),
    "pet.kind": ("lora", "prompt"),
    "sapt.learning": ("attention", "own", "mean"),
    "sapt.selection": ("attention", "mean"),
    "sapt.key_start": ("random", "query"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "model.attention": ("auto", "xla", "splash", "cudnn"),
    "data.truncation": ("middle", "end"),
    "data.on_long_target": ("cut", "error"),
    "data.references": ("first", "random"),
    "data.on_bad_instance": ("skip_empty", "keep", "skip", "error"),
    "train.loss_mean": ("tokens", "micro_batches"),
    "train.partial_batch": ("fill", "drop"),
    "train.best_of_equals": ("last", "first"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "eval.references": ("best", "first", "random"),
    "eval.routing": ("method", "oracle"),
}
FREE = {
    "task_order", "disabled_tasks", "data_dir", "data.prefetch_threads", "data.prefetch_batches", "model.remat",
    "model.attention", "train.log_every_steps", "train.figures", "train.checkpoint_every_steps", "train.profile_steps",
    "eval.batch_size", "eval.unseen_tasks", "eval.single_task_runs", "eval.routing", "eval.joint_run", "eval.general",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.rules",
    "own_dir", "compilation_cache",
}  # fmt: skip
# Adding a method touches no list here: what a range or a choice means is the same for its settings as for these.
OF_METHODS = tuple(f"{name}." for name in METHODS if name != "sapt")


def changed(**changes) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("make", [default_config, demo.get_config, smollm2_superni.get_config])
def test_the_configs_pass(make):
    check_config(make())


def test_a_field_that_does_not_exist_is_named_with_the_nearest():
    config = default_config()
    config.train.epocks = 3
    config.optimiser = ConfigDict({"learning_rate": 1e-3})
    with pytest.raises(ValueError) as error:
        check_config(config)
    assert str(error.value).splitlines() == [
        "config.optimiser.learning_rate is not a setting. Did you mean config.optimizer.learning_rate?",
        "config.train.epocks is not a setting. Did you mean config.train.epochs?",
    ]
    assert unknown_fields(["train.epochs", "zzz"]) == ["config.zzz is not a setting."]
    assert unknown_fields(["kl_ratio"]) == ["config.kl_ratio is not a setting. Did you mean config.sapt.kl_ratio?"]


def test_a_missing_field_is_named():
    config = default_config()
    del config.eval.batch_size
    with pytest.raises(ValueError, match="config.eval.batch_size is missing; sapt_jax/config.py has it"):
        check_config(config)


@pytest.mark.parametrize(
    ("names", "least", "within"), [(POSITIVE_SETTINGS, 1, POSITIVE), (NOT_NEGATIVE_SETTINGS, 0, NOT_NEGATIVE)]
)
def test_a_value_out_of_range_is_named(names, least, within):
    fields = flatten(default_config())
    known = {name for name in SETTINGS if SETTINGS[name].must_be == within and not name.startswith(OF_METHODS)}
    assert known - set(names) <= {"sapt.query_init_std"}
    for name in names:
        lowest = type(fields[name])(least)
        check_config(changed(**{name: lowest, "train.accumulation": 1}))
        with pytest.raises(ValueError, match=f"config.{name}={lowest - 1} must be {within}"):
            check_config(changed(**{name: lowest - 1}))
        with pytest.raises(ValueError, match=f"config.{name}=None must be of type {type(lowest).__name__}"):
            check_config(changed(**{name: None}))


NUMBERS = [name for name, row in SETTINGS.items() if (row.of_type or type(row.default)) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range_without_nan_and_infinity(name):
    row = SETTINGS[name]
    assert row.must_be is not None, "say which numbers it takes"
    assert row.default is None or row.problem(name, row.default) is None
    for value in (math.nan, math.inf, -math.inf, 10**5000, -(10**5000)):
        problem = row.problem(name, value)
        assert problem.startswith(f"config.{name}=") and " must be " in problem and len(problem) < 200


def test_what_a_range_takes():
    share = Range(0, 1, below=True)
    assert (
        0 in share and 0.99 in share and 1 not in share and -1e-9 not in share and str(share) == "from 0 to less than 1"
    )
    assert 0 not in POSITIVE and 1e-300 in POSITIVE and 0 in NOT_NEGATIVE
    for name, value in (
        ("seed", 123456789012), ("seed", -1), ("data.seed", 2**32), ("model.dropout", 1.0), ("mesh.data", -2),
        ("pseudo_samples.writer.top_p", 1.5), ("data.max_source_length", 1), ("pet.rank", 2**31),
    ):  # fmt: skip
        assert SETTINGS[name].problem(name, value).startswith(f"config.{name}={value} must be ")
    assert SETTINGS["seed"].problem("seed", 2**32 - 1) is None
    assert SETTINGS["data.max_target_length"].problem("x", 1) == "config.x=1 must be at least 2."


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_named_with_those_there_are(name):
    for choice in CHOICES[name]:
        check_config(changed(**{name: choice}))
    with pytest.raises(ValueError) as error:
        check_config(changed(**{name: "sideways"}))
    assert f"config.{name}='sideways' is unknown; choose one of {', '.join(CHOICES[name])}." in str(error.value)


@pytest.mark.parametrize("name", ["model.dtype", "model.param_dtype"])
def test_float16_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="such as a T4, takes float32"):
        check_config(changed(**{name: "float16"}))


def test_every_choice_is_tested():
    known = {name for name, row in SETTINGS.items() if row.choices and not name.startswith(OF_METHODS)}
    assert known == CHOICES.keys() | {"method", "benchmark", "data_source"}
    for name in ("sapt", "sequential", "inc_lora"):
        check_config(changed(method=name))
    with pytest.raises(ValueError, match="config.method='sapd' is unknown; choose one of sapt, sequential, inc_lora"):
        check_config(changed(method="sapd"))


def test_a_value_of_another_type_is_named():
    assert Setting(3, "").problem("n", 2.5) == "config.n=2.5 must be of type int."
    assert Setting(3, "").problem("n", True) == "config.n=True must be of type int."
    assert Setting(0.5, "").problem("x", 2) is None
    assert Setting(None, "", of_type=float).problem("x", None) is None
    assert Setting(None, "", of_type=float).problem("x", "a") == "config.x='a' must be of type float."
    assert Setting((), "").problem("t", [1]) is None


def test_all_faults_are_in_one_error():
    config = changed(**{"train.epochs": 0, "pet.rank": -4, "data.dev_size": -1, "optimizer.schedule": "wave"})
    config.seeed = 1
    with pytest.raises(ValueError) as error:
        check_config(config)
    for name in ("train.epochs=0", "pet.rank=-4", "data.dev_size=-1", "optimizer.schedule='wave'", "seeed"):
        assert f"config.{name} " in str(error.value)


def test_what_does_not_go_together_is_named():
    check_config(changed(**{"train.batch_size": 12, "train.accumulation": 4}))
    for changes, message in (
        (
            {"train.batch_size": 12, "train.accumulation": 5},
            "config.train.batch_size=12 is not a multiple of config.train.accumulation=5",
        ),
        ({"train.profile_steps": (3, 2)}, r"config.train.profile_steps=\(3, 2\) must be \(first, last\) step"),
        ({"train.profile_steps": ("3", "4")}, r"config.train.profile_steps=\('3', '4'\) must be \(first, last\) step"),
        ({"optimizer.rates": (("(", 1.0),)}, r"config.optimizer.rates=.*: \('\(', 1.0\) cannot be"),
        (
            {"pseudo_samples.pool_answers": True, "pseudo_samples.source": "generate"},
            "config.pseudo_samples.pool_answers: with source='generate' prompts are pooled",
        ),
        (
            {"optimizer.options": ("weight_decay", 0.1)},
            r"options=\('weight_decay', 0.1\): 'weight_decay', 0.1 cannot be",
        ),
        ({"optimizer.options": (("b1", 1.5),)}, r"options=\(\('b1', 1.5\),\): b1 must be from 0 to less than 1"),
        ({"optimizer.options": (("b2", -1),)}, "b2 must be from 0 to less than 1"),
        ({"optimizer.options": (("eps", -1.0),)}, "eps must be positive"),
        ({"optimizer.options": (("weight_decay", math.nan),)}, "weight_decay must be not negative"),
        ({"optimizer.options": (("weight_decay", "x"),)}, "config.optimizer.name='adamw' cannot use them"),
        ({"optimizer.options": (("momentun", 0.9),)}, "adamw takes no momentun"),
        ({"optimizer.name": "adamx"}, "config.optimizer.name='adamx' is no optimizer"),
        ({"optimizer.rates": ((".*", math.inf),)}, "config.optimizer.rates="),
        ({"data.buckets": (64,)}, r"config.data.buckets=\(64,\) must be pairs of positive lengths"),
        ({"data.buckets": (("a", 4),)}, "must be pairs of positive lengths"),
        ({"data.buckets": ((8, 2.5),)}, "must be pairs of positive lengths"),
        ({"data.buckets": ((8, 4), (4, 8))}, r"one must bound all the others; add \(8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(changed(**changes))


def test_the_settings_of_a_method_are_the_fields_of_its_file():
    config = changed(**{"sapt.kl_ratio": 0.5, "sapt.warm_start_steps": 7, "pet.rank": 3})
    method = make_method(config)
    assert (method.kl_ratio, method.warm_start_steps, method.pet.rank) == (0.5, 7, 3)
    assert method == METHODS["sapt"](pet=method.pet, kl_ratio=0.5, warm_start_steps=7)
    with pytest.raises(ValueError, match="config.method='nobody' is unknown"):
        make_method(changed(method="nobody"))


def test_the_protocol_names_the_switches_of_the_method_that_runs():
    told = protocol_of(changed(**{"sapt.pool_padding": True, "data.max_test": 9}))
    assert told["sapt.pool_padding"] is True and told["data.max_test"] == 9 and told["needs_task_id"] is False
    assert "sapt.pool_padding" not in protocol_of(changed(method="sequential"))


def test_a_run_records_its_config_and_goes_on_with_the_same(tmp_path):
    record_config(changed(seed=7), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded == json.loads(json.dumps({**flatten(default_config()), "seed": 7}))
    check_same_run(changed(seed=7), tmp_path / "run")


def test_settings_that_differ_are_all_listed_and_change_nothing(tmp_path):
    record_config(default_config(), tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        check_same_run(changed(**{"seed": 7, "sapt.query_init_std": 0.5, "data_dir": "other"}), tmp_path)
    lines = str(error.value).splitlines()
    assert str(tmp_path) in lines[0] and "new --workdir" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "config.sapt.query_init_std: None before, 0.5 now",
        "config.seed: 42 before, 7 now",
    ]
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.slow
def test_every_field_but_the_free_ones_is_compared(tmp_path):
    fields = flatten(default_config())
    other = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 0.5, str: lambda x: x + "x"}
    other |= {tuple: lambda x: ((8, 4),), type(None): lambda x: 0.5}
    assert fields.keys() >= FREE
    for number, (name, value) in enumerate(fields.items()):
        workdir = tmp_path / str(number)
        record_config(default_config(), workdir)
        config = changed(**{name: True if name == "data.add_bos" else other[type(value)](value)})
        if name in FREE or name.startswith(OF_METHODS):
            check_same_run(config, workdir)
        else:
            with pytest.raises(ValueError, match=f"config.{name}: "):
                check_same_run(config, workdir)


# A config.json of the time when SAPT's settings stood outside its section, as far as it differs from today's.
BEFORE = {
    "method": "sapt",
    "kl_ratio": 0.2,
    "attention.query_hidden": 50,
    "attention.query_init_std": 0.02,
    "attention.temperature": 1.0,
    "attention.pool_padding": True,
    "attention.learning": "attention",
    "attention.selection": "mean",
    "attention.warm_start_steps": 100,
    "attention.warm_start_learning_rate": 1e-3,
    "pseudo_samples.batch_size": 32,
    "pseudo_samples.generator.steps": 44,
    "optimizer.learning_rate": 2e-3,
    "optimizer.query_projection_learning_rate": 2e-4,
    "optimizer.key_learning_rate": 5e-4,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8,
    "optimizer.weight_decay": 0.0,
    "train.epochs": 3,
}


def test_the_config_of_an_older_run_is_understood(tmp_path):
    now = {
        "sapt.kl_ratio": 0.2,
        "sapt.query_hidden": 50,
        "sapt.query_init_std": 0.02,
        "sapt.pool_padding": True,
        "sapt.selection": "mean",
        "sapt.warm_start_steps": 100,
        "sapt.warm_start_learning_rate": 1e-3,
        "sapt.reflection_batch": 32,
        "pseudo_samples.writer.steps": 44,
        "optimizer.learning_rate": 2e-3,
        "optimizer.rates": (("selector/key", 0.25), ("selector/query_projection/.*", 0.1), (".*", 1.0)),
        "optimizer.options": (("weight_decay", 0.0),),
        "train.epochs": 3,
    }
    upgraded = upgrade(BEFORE)
    assert upgraded.keys() == SETTINGS.keys()
    config = changed(**now)
    assert upgraded == flatten(config)
    (tmp_path / "config.json").write_text(json.dumps(BEFORE))
    check_same_run(config, tmp_path)
    with pytest.raises(ValueError, match="config.sapt.kl_ratio: 0.2 before, 0.3 now"):
        check_same_run(changed(**{**now, "sapt.kl_ratio": 0.3}), tmp_path)


def test_sequential_lora_and_other_options_of_an_older_run():
    upgraded = upgrade({"method": "seq_lora", "optimizer.beta1": 0.8, "optimizer.weight_decay": 0.1})
    assert upgraded["method"] == "sequential"
    assert dict(upgraded["optimizer.options"]) == {"b1": 0.8, "weight_decay": 0.1}
