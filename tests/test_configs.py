"""Every run's config: it builds, fits the model that it names, and has the values of the paper's runs."""

import importlib
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from configs import ablations, methods, paper
from sapt_jax.config import check_config, flatten, make_method
from sapt_jax.data.benchmarks import TASK_ORDERS, resolve_task_order
from sapt_jax.methods import METHODS
from sapt_jax.models.families import DTYPES, VARIANTS

FOLDER = Path(paper.__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "paper", "default"))
PAPER = [name for name in NAMES if name.startswith(("t5_", "llama2_")) and name != "t5_tiny"]

# Read off the paper's released scripts; kl_ratio weighs the mean KL over one update's pseudo-samples.
TABLE = {
    ("t5", "superni"): {
        "optimizer.learning_rate": 3e-4, "train.epochs": 100, "train.batch_size": 32, "eval.batch_size": 128,
        "data.max_source_length": 512, "data.max_target_length": 50, "pet.rank": 4, "pet.alpha": 32.0,
        "sapt.kl_ratio": 2.0, "pseudo_samples.dir": "lora_gen_superni_t5", "sapt.query_init_std": None,
    },
    ("t5", "long"): {
        "optimizer.learning_rate": 3e-4, "train.epochs": 10, "train.batch_size": 32, "eval.batch_size": 128,
        "data.max_source_length": 512, "data.max_target_length": 50, "pet.rank": 8, "pet.alpha": 32.0,
        "sapt.kl_ratio": 0.2, "pseudo_samples.dir": "lora_gen_long_t5", "sapt.query_init_std": None,
    },
    ("llama2", "superni"): {
        "optimizer.learning_rate": 5e-5, "train.epochs": 50, "train.batch_size": 32, "eval.batch_size": 32,
        "data.max_source_length": 1024, "data.max_target_length": 50, "pet.rank": 4, "pet.alpha": 32.0,
        "sapt.kl_ratio": 1.0, "pseudo_samples.dir": "lora_gen_superni_llama", "sapt.query_init_std": 0.02,
    },
    ("llama2", "long"): {
        "optimizer.learning_rate": 5e-5, "train.epochs": 20, "train.batch_size": 32, "eval.batch_size": 32,
        "data.max_source_length": 1024, "data.max_target_length": 50, "pet.rank": 4, "pet.alpha": 32.0,
        "sapt.kl_ratio": 2.0, "pseudo_samples.dir": "lora_gen_long_llama", "sapt.query_init_std": 0.02,
    },
}  # fmt: skip
EVERYWHERE = {
    "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.name": "adamw",
    "optimizer.options": (("weight_decay", 0.0),), "optimizer.max_grad_norm": 1.0, "optimizer.rates": ((".*", 1.0),),
    "sapt.query_hidden": 100, "sapt.temperature": 1.0,
    "model.dtype": "bfloat16", "eval.max_new_tokens": 50, "seed": 42, "method": "sapt",
    "pseudo_samples.source": "files", "train.eval_every_epochs": 5,
}  # fmt: skip


def module_of(name):
    return importlib.import_module(f"configs.{name}")


def read(config, name):
    for part in name.split("."):
        config = config[part]
    return config


def test_the_promised_configs_are_there():
    sizes = {"t5": ("large", "xl", "xxl"), "llama2": ("7b", "13b")}
    promised = {f"{family}_{size}_{run}" for family in sizes for size in sizes[family] for run in ("superni", "long")}
    assert promised == set(PAPER)
    assert "t5_tiny" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_is_consistent(name):
    c = module_of(name).get_config()
    check_config(c)
    make_method(c)
    if c.benchmark != "demo":
        assert len(resolve_task_order(c.task_order, c.benchmark)) >= 3
    assert c.model.dtype in DTYPES and c.model.param_dtype in DTYPES
    assert bool(c.model.path) != bool(c.model.variant)
    if not c.model.path.startswith("pypi:"):
        assert (c.model.variant or Path(c.model.path).name) in VARIANTS
    assert c.eval.max_new_tokens <= c.data.max_target_length
    # One micro-batch can be spread over 8 devices.
    assert c.train.batch_size // c.train.accumulation % min(8, c.train.batch_size) == 0


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_the_launch_command(name):
    assert f"python -m sapt_jax.main --config=configs/{name}.py --workdir=" in module_of(name).__doc__


@pytest.mark.parametrize("name", PAPER)
def test_values_are_the_papers(name):
    family, size, run = name.split("_")
    c = module_of(name).get_config()
    for field, value in (TABLE[family, run] | EVERYWHERE).items():
        assert read(c, field) == value, field
    assert c.benchmark == {"superni": "superni", "long": "long_sequence"}[run]
    assert len(resolve_task_order(c.task_order, c.benchmark)) == 15
    assert Path(c.model.path).name in {f"t5-{size}", f"t5-v1_1-{size}", f"llama-2-{size}"}


@pytest.mark.parametrize("name", PAPER)
def test_argument_chooses_order_and_size(name):
    module, run = module_of(name), name.split("_")[2]
    plain = module.get_config()
    for order in TASK_ORDERS:
        if order.startswith(run):
            assert module.get_config(f"order={order}").task_order == order
    size = "13b" if name.startswith("llama2") else "base"
    changed = module.get_config(f"size={size}")
    assert changed.model.path.endswith(size) and changed.task_order == plain.task_order
    with pytest.raises(ValueError, match="size='tall' is unknown; choose one of"):
        module.get_config("size=tall")
    with pytest.raises(ValueError, match="'oder=1' is not understood; its defaults are 'order="):
        module.get_config("oder=1")


def test_argument_reaches_the_config_from_the_command_line(monkeypatch):
    argv = ["main", f"--config={FOLDER}/t5_xl_superni.py:order=superni_748,size=xxl", "--config.pet.rank=2"]
    # Overrides of single fields are looked for in sys.argv.
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=True)
    values(argv)
    assert holder.value.task_order == "superni_748"
    assert holder.value.model.path == paper.T5_FOLDERS["xxl"]
    assert holder.value.pet.rank == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("without_arm", {"sapt.kl_ratio": 0.0}),
        ("without_attentive_learning", {"sapt.learning": "own"}),
        ("without_attentive_selection", {"sapt.selection": "mean"}),
        ("mean_attention", {"sapt.learning": "mean", "sapt.selection": "mean"}),
    ],
)
def test_an_ablation_is_a_delta(name, expected):
    whole = flatten(importlib.import_module("configs.demo").get_config())
    config = ablations.get_config(f"name={name},of=demo")
    check_config(config)
    delta = {field: value for field, value in flatten(config).items() if value != whole[field]}
    # The demo has a warm start already.
    assert delta == expected
    assert make_method(config) != make_method(importlib.import_module("configs.demo").get_config())


def test_an_unknown_ablation_is_an_error():
    with pytest.raises(ValueError, match="name='without_luck' is unknown; choose without_arm, "):
        ablations.get_config("name=without_luck")


def delta(name, of):
    """What a preset changes in another config, but for the method and the rates of SAPT's selector."""
    config = methods.get_config(f"name={name},of={of}")
    check_config(config)
    assert config.method == name
    before = flatten(module_of(of).get_config())
    changed = {field: value for field, value in flatten(config).items() if value != before[field]}
    rates = changed.pop("optimizer.rates", None)
    assert rates in (None, ((".*", 1.0),)) and (name != "sapt" or rates is None)
    changed.pop("method", None)
    return changed


@pytest.mark.parametrize("of", ["demo", "t5_large_superni", "llama2_7b_long"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_preset_for_every_config(name, of):
    changed = delta(name, of)
    kind = METHODS[name].only
    assert changed.get("pet.kind", "lora") == (kind[0] if kind else changed.get("pet.kind", "lora"))


def test_presets_are_what_the_methods_authors_use():
    """BASELINES of the field, as the methods' releases have them; LoRA methods stand beside SAPT at its settings."""
    assert delta("sequential", "t5_large_superni") == delta("ewc", "llama2_7b_long") == delta("o_lora", "demo") == {}
    rates = {"optimizer.learning_rate": 1e-3, "train.epochs": 1, "train.eval_every_epochs": 1, "train.batch_size": 64}
    assert delta("o_lora", "t5_large_long") == rates
    assert delta("o_lora", "llama2_7b_long") == {"optimizer.learning_rate": 1e-4}
    prompts = {"pet.kind": "prompt", "optimizer.options": (("weight_decay", 1e-5),)}
    assert delta("prog_prompt", "t5_large_superni") == {**prompts, "optimizer.learning_rate": 0.3}
    on_long = {**prompts, "optimizer.learning_rate": 0.3, "train.batch_size": 8}
    assert delta("prog_prompt", "t5_large_long") == on_long
    on_llama = {**prompts, "optimizer.learning_rate": 0.03, "train.batch_size": 16}
    assert delta("prog_prompt", "llama2_7b_superni") == on_llama
    assert delta("prog_prompt", "demo") == {**prompts, "optimizer.learning_rate": 0.03}
    assert delta("l2p", "t5_large_long") == {"pet.kind": "prompt", "optimizer.learning_rate": 0.03}


def test_a_presets_argument_reaches_the_other_config():
    config = methods.get_config("name=l2p,order=long_mnli,of=t5_large_long,protocol=released")
    assert config.task_order == "long_mnli" and config.data.dev_is_test and config.method == "l2p"
    for argument, message in {
        "name=luck": "name='luck' is unknown; choose sapt, ",
        "of=nothing": "of='nothing' is no config of the folder configs",
        "name=ewc,of=demo,order=long": "'order=long' is not understood: configs/demo.py takes none",
        "name=ewc,of=t5_large_long,oder=long": "'oder=long' is not understood; its defaults are",
    }.items():
        with pytest.raises(ValueError, match=message):
            methods.get_config(argument)


@pytest.mark.parametrize("name", PAPER)
def test_one_argument_brings_the_released_protocol_back(name):
    mended, released = (module_of(name).get_config(f"protocol={choice}") for choice in ("mended", "released"))
    is_llama = name.startswith("llama2")
    expected = {
        "data.dev_is_test": True,
        "sapt.pool_padding": True,
        "sapt.reflect_in_first_update": False,
        "optimizer.name": "hf_adamw",
        "sapt.round_targets": True,
        "pseudo_samples.pool_answers": is_llama,
        "data.pad_with_bos": is_llama,
        "train.accumulation": 2 if name.startswith("t5_") and name.endswith("_long") else 4,
        "model.dropout": 0.0 if is_llama else 0.1,
        "train.loss_mean": "micro_batches",
        "train.partial_batch": "drop",
        "train.evaluate_at_end": False,
        "train.best_of_equals": "first",
        "data.truncation": "end",
        "data.references": "random",
        "eval.references": "random",
        "data.on_bad_instance": "keep",
        "data.add_bos": False,
        "data.target_keeps_end": not is_llama,
        "pet.stop_gradient_through_bank": True,
    }
    before, after = flatten(mended), flatten(released)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in expected if before[key] != expected[key]}
    assert {key: after[key] for key in expected} == expected
    check_config(released)
    with pytest.raises(ValueError, match="protocol='paper' is unknown"):
        module_of(name).get_config("protocol=paper")
