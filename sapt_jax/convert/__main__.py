"""Converts models, and what a run learned, between this package and others.

python -m sapt_jax.convert SUBCOMMAND --help
"""

import argparse
import sys

from sapt_jax.command_line import told_in_one_line
from sapt_jax.convert import base_commands, learned_commands


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line as well."""

    def error(self, message: str) -> None:
        sys.exit(f"error: {self.prog.rpartition(' ')[2]}: {message}; --help shows an example")


def main(arguments: list[str]) -> None:
    """Runs the command that the command line names."""
    parser = _Parser(prog="python -m sapt_jax.convert", description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    base_commands.add_commands(subparsers)
    learned_commands.add_commands(subparsers)
    chosen = parser.parse_args(arguments)
    with told_in_one_line():
        chosen.command(chosen)


if __name__ == "__main__":
    main(sys.argv[1:])
