"""The files of the paper's PyTorch code, in and out: one folder saved_weights for each task.

    lora_weights_A.pt, lora_weights_B.pt   {"...lora_q.lora_A": [R, in], ...}, {"...lora_q.lora_B": [out, R], ...}
    trans_input.pt                         query projection: 0.weight [100, D], 1.weight [D, 100], 3.weight, 3.bias [D]
    prompts_keys_till_now.pt               [tasks so far, D], the newest task first
    attention_weights.pkl                  a pickled numpy vector [tasks so far], the newest task first

Format: https://github.com/circle-hit/SAPT (src/run_t5.py, src/run_llama.py).
"""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from sapt_jax.data.benchmarks import BENCHMARKS
from sapt_jax.data.stream import order_of
from sapt_jax.export.learned import Ended, Learned, write_run
from sapt_jax.export.safe_pickle import read_array
from sapt_jax.export.selector import make_selector, query_projection
from sapt_jax.export.sites import Site, base_parameters, hf_modules, kernel_path
from sapt_jax.models.families import family_of, read_shape
from sapt_jax.pet import Lora
from sapt_jax.pet.lora import QUERY_AND_VALUE, sites
from sapt_jax.pseudo_samples.written_samples import pool_file
from sapt_jax.state import Trainable, Tree
from sapt_jax.storage.new_folder import new_folder

_A, _B = "lora_weights_A.pt", "lora_weights_B.pt"
_PROJECTION, _KEYS, _ATTENTION = "trans_input.pt", "prompts_keys_till_now.pt", "attention_weights.pkl"
FILES = (_A, _B, _PROJECTION, _KEYS, _ATTENTION)
# Of the query projection, in src/t5_prompt.py; for LLaMA it is the default of an argument.
HIDDEN = 100
_LAYERS_OF_PROJECTION = {"down": "0.weight", "up": "1.weight", "scale": "3.weight", "bias": "3.bias"}


def write_saved(learned: Learned, out: Path) -> None:
    """Writes OUT/1-NAME/saved_weights, OUT/2-NAME/saved_weights, ... as the paper's code names them.

    Pseudo-samples that the run wrote go to OUT/generated_data, what its --gen_data_dir takes.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      ValueError: the run has no SAPT-LoRA block for each task, or one that the paper's code cannot load.
      FileExistsError: the folder exists.
    """
    torch = _import_torch("to-reference")
    _check_loadable(learned)
    names = _parameter_names(learned.shape)

    def tensor(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array, order="C"))

    with new_folder(out) as unfinished:
        for index, (task, trainable) in enumerate(zip(learned.tasks, learned.trainables, strict=True)):
            folder = unfinished / f"{index + 1}-{task}" / "saved_weights"
            folder.mkdir(parents=True)
            for file, leaf in ((_A, "a"), (_B, "b")):
                state = {
                    f"{names[site].replace('{layer}', str(layer))}.lora_{leaf.upper()}": tensor(matrix.T)
                    for site, block in sites(trainable.slot).items()
                    for layer, matrix in enumerate(block[leaf])
                }
                torch.save(state, folder / file)
            projection = query_projection(trainable.selector)
            state = {name: tensor(projection[part].T) for part, name in _LAYERS_OF_PROJECTION.items()}
            torch.save(state, folder / _PROJECTION)
            torch.save(tensor(learned.frozen.memory["keys"][index::-1]), folder / _KEYS)
            targets = learned.frozen.memory["reflection_targets"]
            (folder / _ATTENTION).write_bytes(_pickled(targets[index, index::-1]))
        for task, pool in learned.pools.items():
            train = Path(pool_file(unfinished, BENCHMARKS[learned.config.benchmark].folder, task))
            train.parent.mkdir(parents=True)
            # Its loader opens all three, and reads the first.
            for file in (train, train.with_name("dev.json"), train.with_name("test.json")):
                file.write_bytes(pool.read_bytes())


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
    ended, older = [], np.zeros((0, shape.d_model), np.float32)
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
        slot, projection = _read_slot(torch, folder, shape), _read_projection(torch, folder, shape.d_model)
        ended.append(Ended(Trainable(slot, make_selector(keys[0], projection)), target[::-1].astype(np.float32)))
        older = keys
    config = _settle(config, base, tasks, [one.trainable for one in ended])
    write_run(config, shape, dict(zip(tasks, ended, strict=True)), out)
    return config


def _import_torch(command: str) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{command} needs PyTorch: pip install torch==2.13.0") from None
    return torch


def _check_loadable(learned: Learned) -> None:
    options, shape = learned.config, learned.shape
    if options.pet.kind != "lora":
        raise ValueError("the paper's code has no soft prompts: to-peft or to-torch take them to PyTorch")
    if len(learned.slots) != len(learned.tasks):
        raise ValueError(
            f"config.method={options.method!r} keeps one block for all tasks; the paper's code has one for each"
        )
    if learned.method.mixing != "attention":
        raise ValueError(
            f"config.method={options.method!r} has neither keys nor a query projection, which the paper's code reads: "
            "to-peft takes its blocks to PyTorch"
        )
    if sites(learned.frozen.bank).keys() != sites(_blocks(shape)).keys():
        raise ValueError(
            "the paper's code has LoRA on query and value of every attention and on nothing else, this run has it by "
            f"config.pet.targets={options.pet.targets!r}: to-torch takes it to PyTorch"
        )
    if (hidden := options.sapt.query_hidden) != HIDDEN:
        raise ValueError(
            f"the paper's code has a query projection {HIDDEN} wide, config.sapt.query_hidden={hidden} is this run's: "
            "to-torch takes it to PyTorch"
        )
    inner = shape.num_heads * shape.head_dim
    if family_of(shape).is_encoder_decoder and inner != shape.d_model:
        raise ValueError(
            f"the paper's code runs a T5 only where its heads together are as wide as the model, and this one's are "
            f"{inner} and {shape.d_model} wide: to-torch takes it to PyTorch"
        )


def _blocks(shape: Any) -> Tree:
    """The leaves of a block of rank 1 that the paper's code has on this model."""
    return Lora(rank=1, alpha=1.0, targets=QUERY_AND_VALUE).block(base_parameters(shape))


def _parameter_names(shape: Any) -> dict[Site, str]:
    """The module of every block: transformers' of the projection, with lora_q or lora_v in place of its name."""
    modules = hf_modules(shape, _blocks(shape))
    return {site: re.sub(r"\.([qv])(_proj)?$", r".lora_\1", module) for site, module in modules.items()}


def _pickled(vector: np.ndarray) -> bytes:
    # numpy 2 names a module that numpy 1, of the paper's time, does not have; both know the older name.
    pickled = pickle.dumps(np.ascontiguousarray(vector), protocol=2)
    return pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def _task_name(folder: Path) -> str:
    named = folder.parent if folder.name == "saved_weights" else folder
    return re.sub(r"^\d+-", "", named.resolve().name)


def _load(torch: Any, file: Path) -> Any:
    """A tensor or a dict of them, none larger than what the file holds."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("it is compressed, which torch.save never does")
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        for tensor in loaded.values() if isinstance(loaded, Mapping) else (loaded,):
            if isinstance(tensor, torch.Tensor) and (
                tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size
            ):
                raise ValueError("it holds tensors that are sparse or larger than the file")
    except Exception as error:
        first = str(error).split("\n", 1)[0]
        raise ValueError(f"{file} cannot be read as plain torch tensors ({first})") from None
    return loaded


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


def _read_slot(torch: Any, folder: Path, shape: Any) -> Tree:
    names, parameters = _parameter_names(shape), base_parameters(shape)
    arrays = {}
    for file, leaf in ((_A, "a"), (_B, "b")):
        shapes = {}
        for site, name in names.items():
            layers, fan_in, fan_out = parameters[kernel_path(site)].shape
            for layer in range(layers):
                size = (-1, fan_in) if leaf == "a" else (fan_out, -1)
                shapes[f"{name.replace('{layer}', str(layer))}.lora_{leaf.upper()}"] = size
        arrays |= _load_named(torch, folder / file, shapes)
    slot = {}
    for site, name in names.items():
        layers = range(parameters[kernel_path(site)].shape[0])
        for leaf in ("a", "b"):
            matrices = [arrays[f"{name.replace('{layer}', str(n))}.lora_{leaf.upper()}"].T for n in layers]
            slot[*site, leaf] = np.stack(matrices)
    return unflatten_dict(slot)


def _settle(config: ConfigDict, base: str, tasks: tuple[str, ...], trainables: Sequence[Trainable]) -> ConfigDict:
    """The config with what the files say: base, method, sizes, and a task order that begins with the tasks."""
    blocks = [block for one in trainables for block in sites(one.slot).values()]
    ranks = {block["a"].shape[-1] for block in blocks} | {block["b"].shape[1] for block in blocks}
    hidden = {query_projection(one.selector)["down"].shape[1] for one in trainables}
    if len(ranks) > 1 or len(hidden) > 1:
        raise ValueError(f"the folders differ: LoRA ranks {sorted(ranks)}, widths of the projection {sorted(hidden)}")
    config = config.copy_and_resolve_references()
    config.model.path, config.model.variant = base, ""
    config.method, config.pet.kind, config.pet.rank = "sapt", "lora", ranks.pop()
    config.pet.targets, config.sapt.query_hidden = QUERY_AND_VALUE, hidden.pop()
    if not _begins_with(config, tasks):
        config.task_order = ",".join(tasks)
        for benchmark in (config.benchmark, "superni", "long_sequence", "own"):
            config.benchmark = benchmark
            if _begins_with(config, tasks):
                break
    return config


def _begins_with(config: ConfigDict, tasks: tuple[str, ...]) -> bool:
    try:
        return order_of(config)[: len(tasks)] == tasks
    except ValueError:
        return False
