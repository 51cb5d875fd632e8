"""A whole SAPT model as a folder for PyTorch, and back.

    model.safetensors   bank.*, keys [T, D], projection.* and enabled [T]: what answers inputs
    run.safetensors     targets [T, T] and every task's projection.*: what a run needs beside it to go on
    config.json         fields of modeling_sapt.SaptConfig, and the run's own settings
    modeling_sapt.py    the model, which needs nothing of this package
    base/               the base model as a transformers folder, where it is included

Every array goes out and comes back bit for bit. A single block, or a plain sum of blocks, has bank.* and enabled alone.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sapt_jax.config import flatten, make_method
from sapt_jax.export.learned import (
    Ended,
    Learned,
    declared_state,
    read_base_shape,
    read_config,
    slot_names,
    write_run,
)
from sapt_jax.export.selector import make_selector, query_projection
from sapt_jax.export.sites import hf_modules
from sapt_jax.export.to_hf import write_base
from sapt_jax.models.families import family_of
from sapt_jax.pet.lora import LAYERS
from sapt_jax.pretrained.loading import format_of
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.state import Frozen, Trainable, Tree, abstract
from sapt_jax.storage.names import check_name
from sapt_jax.storage.new_folder import new_folder
from sapt_jax.storage.text_files import read_json, to_jsonable

MODEL, RUN, MODELING, BASE = "model.safetensors", "run.safetensors", "modeling_sapt.py", "base"


def write_model(learned: Learned, include_base: bool, out: Path) -> None:
    """Writes what a run learned as a model for PyTorch.

    Args:
      include_base: whether the folder gets the base model's weights; else it says where they lie.

    Raises:
      ValueError: the base model is no transformers folder and not to be included, or has random weights; or the method
        mixes its blocks in a way of its own.
      FileExistsError: the folder exists.
    """
    path = learned.config.model.path
    learned.check_linear()
    if learned.method.mixing not in ("attention", "one", "sum"):
        raise ValueError(
            f"config.method={learned.config.method!r} chooses its blocks in a way that modeling_sapt.py does not know, "
            "which has SAPT's attention, a single block and plain sums: to-peft and to-hf take blocks under given "
            "weights to PyTorch"
        )
    if not include_base:
        _check_readable(learned)
    frozen = learned.frozen
    if learned.method.mixing == "one":
        # The one block is never withdrawn, whatever the task that trained it last.
        frozen = frozen.replace(enabled=np.ones(1, bool))
    with new_folder(out) as folder:
        _save(_model_tensors(frozen, learned.trainables[-1]), folder / MODEL)
        history = jax.tree.map(lambda *parts: np.stack(parts), *(one.selector for one in learned.trainables))
        _save(_run_tensors(frozen, history), folder / RUN)
        config = _config(learned, None if include_base else str(resolve_path(path).absolute()))
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name(MODELING), folder / MODELING)
        if include_base:
            (folder / BASE).mkdir()
            write_base(learned, folder / BASE, {})


def read_model(folder: Path, base: str, out: Path) -> None:
    """Writes a workdir, as the run left it, from what `write_model` wrote.

    Args:
      base: where the base model lies now; "" is the folder's own, or where the run had it.

    Raises:
      FileNotFoundError: the folder lacks a file, or its base model is gone.
      FileExistsError: the workdir exists.
      ValueError: a file is broken, does not fit the base model, or is of a method that keeps more than it holds.
    """
    if missing := [name for name in ("config.json", MODEL, RUN) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: give a folder that to-torch wrote")
    file = folder / "config.json"
    exported = read_json(file, "Fetch the folder anew.")
    if not isinstance(exported.get("run"), dict) or not isinstance(exported.get("run_tasks"), list):
        raise ValueError(f"{file} has no field run or run_tasks: give a folder that to-torch wrote")
    config = read_config(exported["run"], str(file))
    tasks = tuple(check_name(name, f"{file}: run_tasks") for name in exported["run_tasks"])
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"{file}: run_tasks must be one task or more, each once, not {', '.join(tasks) or 'none'}")
    if not exported.get("base"):
        config.model.path = str((folder / BASE).absolute())
    shape, method = read_base_shape(config, base), make_method(config)
    if len(slot_names(method, tasks)) != len(tasks):
        raise ValueError(
            f"config.method={config.method!r} keeps the block of its last task alone: the run cannot be rebuilt from it"
        )
    frozen, trainable = abstract(declared_state(config, shape, len(tasks)))
    attends = method.mixing == "attention"
    if frozen.memory and not attends:
        raise ValueError(
            f"config.method={config.method!r} keeps {', '.join(sorted(frozen.memory))} beside its blocks, which "
            "to-torch leaves out: the run cannot be rebuilt from it"
        )
    history = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(tasks), *x.shape), x.dtype), trainable.selector)
    model = _load(folder / MODEL, _model_tensors(frozen, trainable))
    run = _load(folder / RUN, _run_tensors(frozen, history))
    bank = {path: model[name] for path, name in _bank_names(frozen.bank).items()}
    bank, ended = flax.traverse_util.unflatten_dict(bank), {}
    for index, task in enumerate(tasks):
        selector, target = {}, None
        if attends:
            projection = {name: run[f"projection.{name}"][index] for name in query_projection(trainable.selector)}
            selector = make_selector(model["keys"][index], projection)
            target = run["targets"][index, : index + 1]
        ended[task] = Ended(Trainable(method.pet.read(bank, index), selector), target)
    write_run(config, shape, ended, out)


def _model_tensors(frozen: Frozen, trainable: Trainable) -> dict[str, Any]:
    bank = flax.traverse_util.flatten_dict(frozen.bank)
    tensors = {name: bank[path] for path, name in _bank_names(frozen.bank).items()} | {"enabled": frozen.enabled}
    return tensors | ({"keys": frozen.memory["keys"], **_projection(trainable.selector)} if trainable.selector else {})


def _run_tensors(frozen: Frozen, history: Tree) -> dict[str, Any]:
    return {"targets": frozen.memory["reflection_targets"], **_projection(history)} if history else {}


def _projection(selector: Tree) -> dict[str, Any]:
    return {f"projection.{name}": array for name, array in query_projection(selector).items()}


def _bank_names(bank: Tree) -> dict[tuple[str, ...], str]:
    """For each array of the bank, by path, a name that a PyTorch module can have: bank.first_second_third."""
    return {path: f"bank.{_joined(path)}" for path in flax.traverse_util.flatten_dict(bank)}


def _joined(path: tuple[str, ...]) -> str:
    return "_".join(part for part in path if part != LAYERS)


def _check_readable(learned: Learned) -> None:
    path = learned.config.model.path
    if not path:
        raise ValueError(
            f"the run's base model is {learned.config.model.variant!r} with random weights, which PyTorch cannot read: "
            "only a run with config.model.path can leave whole"
        )
    form = format_of(resolve_path(path))
    if form != "hf":
        raise ValueError(
            f"{path} is no transformers folder, which PyTorch would read: add --include-base, or name the same model "
            "as a transformers folder with --base"
        )


def _config(learned: Learned, base: str | None) -> dict[str, Any]:
    options, method = learned.config, learned.method
    modules = hf_modules(learned.shape, learned.frozen.bank) if options.pet.kind == "lora" else {}
    # A single block is the sum of all.
    mixing = {"selection": "sum"}
    if method.mixing == "attention":
        mixing = {name: getattr(method, name) for name in ("temperature", "pool_padding", "selection")}
    return {
        "model_type": "sapt",
        "architectures": ["SaptModel"],
        "auto_map": {"AutoConfig": "modeling_sapt.SaptConfig", "AutoModel": "modeling_sapt.SaptModel"},
        "base": base,
        "is_encoder_decoder": family_of(learned.shape).is_encoder_decoder,
        "tasks": learned.slots,
        "kind": options.pet.kind,
        "modules": {_joined(site): module for site, module in modules.items()},
        "scale": options.pet.alpha / options.pet.rank,
        "width": learned.shape.d_model,
        **mixing,
        "run": to_jsonable(flatten(options)),
        "run_tasks": learned.tasks,
    }


def _save(tensors: Mapping[str, Any], file: Path) -> None:
    # safetensors writes the memory as it lies.
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file, metadata={"format": "pt"})


def _load(file: Path, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file ({error}): copy it anew") from error
    problems = [f"missing: {name}" for name in wanted if name not in arrays]
    problems += [f"unexpected: {name}" for name in arrays if name not in wanted]
    for name in wanted.keys() & arrays.keys():
        found, needed = arrays[name], wanted[name]
        if (found.shape, found.dtype) != (tuple(needed.shape), needed.dtype):
            problems.append(f"{name} is {found.dtype}{list(found.shape)}, not {needed.dtype}{list(needed.shape)}")
    if problems:
        raise ValueError(f"{file} does not fit the base model or config.json:\n  " + "\n  ".join(sorted(problems)))
    return arrays
