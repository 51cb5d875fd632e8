"""Commands that take what a run learned to PyTorch and back."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from sapt_jax.command_line import load_config
from sapt_jax.config import check_config, flatten
from sapt_jax.convert.subcommand import add_subcommand
from sapt_jax.export import reference, to_hf, to_peft, to_torch
from sapt_jax.export.learned import read_run

# What `sapt_jax.main` is given where no config was named: every setting at its default.
_DEFAULT = "configs/default.py"
_WEIGHTS = "one for each block, with commas, sum 1; left out for a method that sums its blocks or has one: all are 1"


def add_commands(subparsers: Any) -> None:
    """Adds to-peft, to-reference, from-reference, to-hf, to-torch and from-torch to the parser's commands."""
    command = add_subcommand(
        subparsers,
        "to-peft",
        "Writes adapters of Hugging Face's PEFT: one task's LoRA block or soft prompt, all of them, or a mixture.",
        "--run=runs/t5_large --task=task1572_samsum_summary --out=adapters/samsum",
        write_peft,
    )
    _add_run(command)
    what = command.add_mutually_exclusive_group()
    what.add_argument("--task", help="the task whose block becomes an adapter")
    what.add_argument("--weights", type=_weights, help=f"a mixture of all blocks, one adapter of rank T*R: {_WEIGHTS}")
    what.add_argument("--all", action="store_true", help="every task's block, an adapter each: OUT/NAME")

    command = add_subcommand(
        subparsers,
        "to-reference",
        "Writes the files of the paper's PyTorch code: OUT/1-NAME/saved_weights, OUT/2-NAME/saved_weights, ...",
        "--run=runs/t5_large --out=outputs",
        lambda arguments: reference.write_saved(read_run(arguments.run, arguments.base), arguments.out),
    )
    _add_run(command)

    command = add_subcommand(
        subparsers,
        "from-reference",
        "Writes a workdir from what the paper's PyTorch code saved, for sapt_jax.main to go on with. The files do not "
        "say alpha, the temperature or the protocol: these come from --config.",
        "--saved=outputs/1-NAME/saved_weights,outputs/2-NAME/saved_weights --base=models/t5-large --out=runs/t5_large "
        "--config=configs/t5_large_superni.py:protocol=released",
        from_reference,
    )
    command.add_argument("--saved", required=True, type=_paths, help="every task's folder, in the order of training")
    command.add_argument("--base", required=True, help="the model that they were trained on")
    command.add_argument("--config", default="", help="of the run that is to go on; by default all defaults")

    command = add_subcommand(
        subparsers,
        "to-hf",
        "Writes the base model with one mixture of LoRA blocks merged into its weights, as a transformers folder.",
        "--run=runs/t5_large --weights=0.1,0.9 --out=models/t5_large_merged",
        lambda arguments: to_hf.write_merged(read_run(arguments.run, arguments.base), arguments.weights, arguments.out),
    )
    _add_run(command)
    command.add_argument("--weights", type=_weights, help=_WEIGHTS)

    command = add_subcommand(
        subparsers,
        "to-torch",
        "Writes the whole model for PyTorch: blocks, keys and query projection, and modeling_sapt.py, which wraps the "
        "base model and mixes the blocks for each input. It names the base model's folder, or has a copy.",
        "--run=runs/t5_large --out=models/t5_large_sapt",
        lambda arguments: to_torch.write_model(
            read_run(arguments.run, arguments.base), arguments.include_base, arguments.out
        ),
    )
    _add_run(command)
    command.add_argument("--include-base", action="store_true", help="with a copy of the base model, in OUT/base")

    command = add_subcommand(
        subparsers,
        "from-torch",
        "Writes the workdir again that to-torch was given, for sapt_jax.main to go on with.",
        "--model=models/t5_large_sapt --out=runs/t5_large",
        lambda arguments: to_torch.read_model(arguments.model, arguments.base, arguments.out),
    )
    command.add_argument("--model", required=True, type=Path, help="the folder that to-torch wrote")
    command.add_argument("--base", default="", help="where the base model lies now, if not where it was")


def write_peft(arguments: argparse.Namespace) -> None:
    """Runs to-peft.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: from `read_run` and the writers of `peft`.
    """
    learned = read_run(arguments.run, arguments.base)
    if arguments.task is not None:
        to_peft.write_task(learned, arguments.task, arguments.out)
    elif arguments.all:
        to_peft.write_all(learned, arguments.out)
    else:
        to_peft.write_mixture(learned, arguments.weights, arguments.out)


def from_reference(arguments: argparse.Namespace) -> None:
    """Runs from-reference, and prints the command that goes on.

    Raises:
      FileNotFoundError, FileExistsError, ModuleNotFoundError, ValueError: from `reference.read_saved`.
    """
    before = load_config(arguments.config)
    check_config(before)
    after = flatten(reference.read_saved(arguments.saved, arguments.base, before, arguments.out))
    changed = {name: value for name, value in after.items() if value != flatten(before)[name]}
    command = ["python", "-m", "sapt_jax.main", f"--config={arguments.config or _DEFAULT}"]
    command += [f"--config.{name}={value}" for name, value in changed.items()]
    print("To go on, with more tasks at the end of config.task_order:")
    print(f"  {shlex.join([*command, f'--workdir={arguments.out}'])}")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", required=True, type=Path, help="the workdir of a run of sapt_jax.main")
    command.add_argument("--base", default="", help="where the base model lies now, if not where the run found it")


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas, such as 0.1,0.9") from None


def _paths(text: str) -> list[Path]:
    return [Path(part.strip()) for part in text.split(",") if part.strip()]
