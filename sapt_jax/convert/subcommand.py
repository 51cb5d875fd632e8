"""What every subcommand of `python -m sapt_jax.convert` has: an example in its --help, and a folder to write."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_subcommand(
    subparsers: Any, name: str, text: str, example: str, function: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """Adds a subcommand that `function` runs, to what `ArgumentParser.add_subparsers` returned.

    Args:
      example: its arguments, for --help.
    """
    command = subparsers.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  python -m sapt_jax.convert {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--out", required=True, type=Path, help="the folder to write; it must not exist")
    command.set_defaults(command=function)
    return command
