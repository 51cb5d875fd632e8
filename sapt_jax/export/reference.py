"""The files of the paper's PyTorch code, in and out: one folder saved_weights for each task.

    lora_weights_A.pt, lora_weights_B.pt   {"...lora_q.lora_A": [R, in], ...}, {"...lora_q.lora_B": [out, R], ...}
    trans_input.pt                         query projection: 0.weight [100, D], 1.weight [D, 100], 3.weight, 3.bias [D]
    prompts_keys_till_now.pt               [tasks so far, D], the newest task first
    attention_weights.pkl                  a pickled numpy vector [tasks so far], the newest task first

Format: https://github.com/circle-hit/SAPT (src/run_t5.py, src/run_llama.py).
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sapt_jax.data.benchmarks import resolve_task_order
from sapt_jax.export.learned import Learned, write_run
from sapt_jax.export.safe_pickle import read_array
from sapt_jax.export.sites import Site, at, hf_modules, pet_sites
from sapt_jax.models.families import read_shape
from sapt_jax.state import Trainable
from sapt_jax.storage.new_folder import new_folder

_A, _B = "lora_weights_A.pt", "lora_weights_B.pt"
_PROJECTION, _KEYS, _ATTENTION = "trans_input.pt", "prompts_keys_till_now.pt", "attention_weights.pkl"
FILES = (_A, _B, _PROJECTION, _KEYS, _ATTENTION)
_LAYERS_OF_PROJECTION = {"down": "0.weight", "up": "1.weight", "scale": "3.weight", "bias": "3.bias"}


def write_saved(learned: Learned, out: Path) -> None:
    """Writes OUT/1-NAME/saved_weights, OUT/2-NAME/saved_weights, ... as the paper's code names them.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      ValueError: the run has no LoRA block for each task.
      FileExistsError: the folder exists.
    """
    torch = _import_torch("to-reference")
    if learned.config.pet.kind != "lora":
        raise ValueError("the paper's code has no soft prompts: to-peft or to-torch take them to PyTorch")
    if len(learned.slots) != len(learned.tasks):
        raise ValueError(
            f"config.method={learned.config.method!r} keeps one block for all tasks; the paper's code has one for each"
        )
    names = _parameter_names(learned.shape)

    def tensor(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array, order="C"))

    with new_folder(out) as unfinished:
        for index, (task, trainable) in enumerate(zip(learned.tasks, learned.trainables, strict=True)):
            folder = unfinished / f"{index + 1}-{task}" / "saved_weights"
            folder.mkdir(parents=True)
            for file, leaf in ((_A, "a"), (_B, "b")):
                stacks = {site: at(trainable.slot, site)[leaf] for site in names}
                state = {
                    f"{name.replace('{layer}', str(layer))}.lora_{leaf.upper()}": tensor(matrix.T)
                    for site, name in names.items()
                    for layer, matrix in enumerate(stacks[site])
                }
                torch.save(state, folder / file)
            projection = trainable.query_projection
            state = {name: tensor(projection[part].T) for part, name in _LAYERS_OF_PROJECTION.items()}
            torch.save(state, folder / _PROJECTION)
            torch.save(tensor(learned.frozen.keys[index::-1]), folder / _KEYS)
            (folder / _ATTENTION).write_bytes(_pickled(learned.frozen.targets[index, index::-1]))


def read_saved(saved: Sequence[Path], base: str, config: ConfigDict, out: Path) -> ConfigDict:
    """Writes a workdir from the folders that the paper's code saved, in the order of the tasks.

    Args:
      saved: .../1-NAME/saved_weights, .../2-NAME/saved_weights, ...
      base: the model that they were trained on.
      config: of the run that is to go on; what the files know better is taken from them.

    Returns:
      The config that the workdir has recorded.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      FileNotFoundError: a folder or file is missing.
      FileExistsError: the workdir exists.
      ValueError: a file is broken, or they fit neither each other nor the base.
    """
    torch = _import_torch("from-reference")
    shape = read_shape(base, "")
    tasks = tuple(_task_name(folder) for folder in saved)
    trainables, targets, older = [], [], np.zeros((0, shape.d_model), np.float32)
    for folder in saved:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: give the saved_weights folder of every task")
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)}: give a saved_weights folder of the paper's code, which writes "
                "them all unless it was run with --run_single"
            )
        keys = _read_keys(torch, folder, older)
        target = read_array(folder / _ATTENTION)
        if target.shape != (len(keys),):
            raise ValueError(f"{folder / _ATTENTION} holds {list(target.shape)}, not one weight for {len(keys)} tasks")
        slot = _read_slot(torch, folder, shape)
        trainables.append(Trainable(slot, keys[0], _read_projection(torch, folder, shape.d_model)))
        targets.append(target[::-1].astype(np.float32))
        older = keys
    config = _settle(config, base, tasks, trainables)
    write_run(config, shape, tasks, trainables, targets, out)
    return config


def _import_torch(command: str) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{command} needs PyTorch: pip install torch==2.13.0") from None
    return torch


def _parameter_names(shape: Any) -> dict[Site, str]:
    """The module of every block: transformers' of the projection, with lora_q or lora_v in place of its name."""
    modules = hf_modules(shape)
    return {site: re.sub(r"\.([qv])(_proj)?$", r".lora_\1", module) for site, module in modules.items()}


def _pickled(vector: np.ndarray) -> bytes:
    # numpy 2 names a module that numpy 1, of the paper's time, does not have; both know the older name.
    pickled = pickle.dumps(np.ascontiguousarray(vector), protocol=2)
    return pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def _task_name(folder: Path) -> str:
    named = folder.parent if folder.name == "saved_weights" else folder
    return re.sub(r"^\d+-", "", named.resolve().name)


def _load(torch: Any, file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).split("\n", 1)[0]
        raise ValueError(f"{file} cannot be read as plain torch tensors ({first})") from None


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy()  # LLaMA's are bfloat16


def _load_named(torch: Any, file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors of a state dict, less what it holds of earlier tasks; -1 is any size, but everywhere the same."""
    state = _load(torch, file)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file} holds no state dict")
    state = {name: tensor for name, tensor in state.items() if ".previous_lora_weights_" not in name}
    problems = [f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in state]
    problems += [f"unknown: {name}" for name in state if name not in shapes]
    known = [name for name in shapes if name in state]
    of_any_size = [name for name in known if -1 in shapes[name] and state[name].ndim == len(shapes[name])]
    free = min((state[name].shape[shapes[name].index(-1)] for name in of_any_size), default=-1)
    for name in known:
        wanted = [free if size == -1 else size for size in shapes[name]]
        if list(state[name].shape) != wanted:
            problems.append(f"{name} is {list(state[name].shape)}, not {wanted}")
    if problems:
        raise ValueError(f"{file} does not fit the base model:\n  " + "\n  ".join(sorted(problems)))
    return {name: _array(tensor) for name, tensor in state.items()}


def _read_keys(torch: Any, folder: Path, older: np.ndarray) -> np.ndarray:
    file = folder / _KEYS
    keys = _load(torch, file)
    wanted = [len(older) + 1, older.shape[1]]
    if not isinstance(keys, torch.Tensor) or list(keys.shape) != wanted:
        found = list(keys.shape) if isinstance(keys, torch.Tensor) else type(keys).__name__
        raise ValueError(
            f"{file} holds {found}, wanted are the keys {wanted} of this task and those before: --saved names all "
            "tasks in the order that they were trained in, and --base their model"
        )
    keys = _array(keys)
    if not np.array_equal(keys[1:], older):
        raise ValueError(f"{file}: the earlier tasks' keys are not those of the folder before; are they of one run?")
    return keys


def _read_projection(torch: Any, folder: Path, d_model: int) -> dict[str, np.ndarray]:
    shapes = {"down": (-1, d_model), "up": (d_model, -1), "scale": (d_model,), "bias": (d_model,)}
    arrays = _load_named(
        torch, folder / _PROJECTION, {_LAYERS_OF_PROJECTION[part]: shape for part, shape in shapes.items()}
    )
    return {part: arrays[name].T for part, name in _LAYERS_OF_PROJECTION.items()}


def _read_slot(torch: Any, folder: Path, shape: Any) -> Any:
    names, sites = _parameter_names(shape), pet_sites(shape)
    arrays = {}
    for file, leaf in ((_A, "a"), (_B, "b")):
        shapes = {}
        for site, name in names.items():
            layers, fan_in, fan_out = at(sites, site)
            for layer in range(layers):
                size = (-1, fan_in) if leaf == "a" else (fan_out, -1)
                shapes[f"{name.replace('{layer}', str(layer))}.lora_{leaf.upper()}"] = size
        arrays |= _load_named(torch, folder / file, shapes)
    slot = {}
    for site, name in names.items():
        stack, attention, projection = site
        layers = range(at(sites, site)[0])
        slot.setdefault(stack, {}).setdefault(attention, {})[projection] = {
            leaf: np.stack([arrays[f"{name.replace('{layer}', str(n))}.lora_{leaf.upper()}"].T for n in layers])
            for leaf in ("a", "b")
        }
    return slot


def _settle(config: ConfigDict, base: str, tasks: tuple[str, ...], trainables: Sequence[Trainable]) -> ConfigDict:
    """The config with what the files say: base, method, sizes, and a task order that begins with the tasks."""
    ranks = {leaf.shape[-1] for one in trainables for leaf in _leaves(one.slot, "a")}
    ranks |= {leaf.shape[1] for one in trainables for leaf in _leaves(one.slot, "b")}
    hidden = {one.query_projection["down"].shape[1] for one in trainables}
    if len(ranks) > 1 or len(hidden) > 1:
        raise ValueError(f"the folders differ: LoRA ranks {sorted(ranks)}, widths of the projection {sorted(hidden)}")
    config = config.copy_and_resolve_references()
    config.model.path, config.model.variant = base, ""
    config.method, config.pet.kind, config.pet.rank = "sapt", "lora", ranks.pop()
    config.attention.query_hidden = hidden.pop()
    if not _begins_with(config, tasks):
        config.task_order = ",".join(tasks)
        for benchmark in (config.benchmark, "superni", "long_sequence", "own"):
            config.benchmark = benchmark
            if _begins_with(config, tasks):
                break
    return config


def _leaves(slot: Any, leaf: str) -> list[np.ndarray]:
    return [block[leaf] for attentions in slot.values() for blocks in attentions.values() for block in blocks.values()]


def _begins_with(config: ConfigDict, tasks: tuple[str, ...]) -> bool:
    try:
        return resolve_task_order(config.task_order, config.benchmark)[: len(tasks)] == tasks
    except ValueError:
        return False
