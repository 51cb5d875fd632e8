"""A whole SAPT model as a folder for PyTorch, and back.

    model.safetensors   bank.*, keys [T, D], projection.* and enabled [T]: what answers inputs
    run.safetensors     targets [T, T] and every task's projection.*: what a run needs beside it to go on
    config.json         fields of modeling_sapt.SaptConfig, and the run's own settings
    modeling_sapt.py    the model, which needs nothing of this package
    base/               the base model as a transformers folder, where it is included

Every array goes out and comes back bit for bit.
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

from sapt_jax.config import flatten
from sapt_jax.export.learned import Learned, abstract_state, read_base_shape, read_config, slot_names, write_run
from sapt_jax.export.sites import hf_modules, is_encoder_decoder
from sapt_jax.export.to_hf import write_base
from sapt_jax.pet import read_slot
from sapt_jax.pretrained.hf import read_json
from sapt_jax.pretrained.loading import format_of
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.run import make_method
from sapt_jax.state import Trainable
from sapt_jax.storage.new_folder import new_folder
from sapt_jax.storage.text_files import to_jsonable

MODEL, RUN, MODELING, BASE = "model.safetensors", "run.safetensors", "modeling_sapt.py", "base"


def write_model(learned: Learned, include_base: bool, out: Path) -> None:
    """Writes what a run learned as a model for PyTorch.

    Args:
      include_base: whether the folder gets the base model's weights; else it says where they lie.

    Raises:
      ValueError: the base model is no transformers folder and not to be included, or has random weights.
      FileExistsError: the folder exists.
    """
    path = learned.config.model.path
    if not include_base:
        _check_readable(learned)
    with new_folder(out) as folder:
        frozen = learned.frozen
        tensors = {
            **_flat(frozen.bank, "bank"),
            **_flat(learned.trainables[-1].query_projection, "projection"),
            "keys": frozen.keys,
            "enabled": frozen.enabled,
        }
        _save(tensors, folder / MODEL)
        history = jax.tree.map(lambda *parts: np.stack(parts), *(one.query_projection for one in learned.trainables))
        _save({**_flat(history, "projection"), "targets": frozen.targets}, folder / RUN)
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
      ValueError: a file is broken, does not fit the base model, or is of sequential LoRA.
    """
    if missing := [name for name in ("config.json", MODEL, RUN) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: give a folder that to-torch wrote")
    exported = read_json(folder / "config.json")
    if not isinstance(exported.get("run"), dict) or not isinstance(exported.get("run_tasks"), list):
        raise ValueError(f"{folder / 'config.json'} has no field run or run_tasks: give a folder that to-torch wrote")
    config, tasks = read_config(exported["run"], str(folder / "config.json")), tuple(exported["run_tasks"])
    if not exported["base"]:
        config.model.path = str((folder / BASE).absolute())
    shape, method = read_base_shape(config, base), make_method(config)
    if len(slot_names(method, tasks)) != len(tasks):
        raise ValueError(
            f"config.method={config.method!r} keeps the block of its last task alone: the run cannot be rebuilt from it"
        )
    frozen, trainable = abstract_state(config, shape, len(tasks))
    projection = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(tasks), *x.shape), x.dtype), trainable.query_projection
    )
    model = _load(
        folder / MODEL,
        {
            **_flat(frozen.bank, "bank"),
            **_flat(trainable.query_projection, "projection"),
            "keys": frozen.keys,
            "enabled": frozen.enabled,
        },
    )
    run = _load(folder / RUN, {**_flat(projection, "projection"), "targets": frozen.targets})
    bank = _like(frozen.bank, model, "bank")
    projections = _like(projection, run, "projection")
    trainables = [
        Trainable(
            read_slot(bank, index), model["keys"][index], jax.tree.map(lambda leaf, i=index: leaf[i], projections)
        )
        for index in range(len(tasks))
    ]
    targets = [run["targets"][index, : index + 1] for index in range(len(tasks))]
    write_run(config, shape, tasks, trainables, targets, out)


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
    options, lora = learned.config, learned.config.pet.kind == "lora"
    return {
        "model_type": "sapt",
        "architectures": ["SaptModel"],
        "auto_map": {"AutoConfig": "modeling_sapt.SaptConfig", "AutoModel": "modeling_sapt.SaptModel"},
        "base": base,
        "is_encoder_decoder": is_encoder_decoder(learned.shape),
        "tasks": learned.slots,
        "kind": options.pet.kind,
        "modules": {"_".join(site): module for site, module in hf_modules(learned.shape).items()} if lora else {},
        "scale": options.pet.alpha / options.pet.rank,
        "temperature": options.attention.temperature,
        "pool_padding": options.attention.pool_padding,
        "selection": options.attention.selection,
        "run": to_jsonable(flatten(options)),
        "run_tasks": learned.tasks,
    }


def _flat(tree: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Leaves under names that a PyTorch module can have: group.first_second_third."""
    return {f"{group}.{name}": leaf for name, leaf in flax.traverse_util.flatten_dict(tree, sep="_").items()}


def _like(tree: Any, arrays: Mapping[str, np.ndarray], group: str) -> Any:
    names = {path: f"{group}.{'_'.join(path)}" for path in flax.traverse_util.flatten_dict(tree)}
    return flax.traverse_util.unflatten_dict({path: arrays[name] for path, name in names.items()})


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
