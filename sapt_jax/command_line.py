"""What every command does alike: it reads a config file, and tells in one line what its user can mend."""

import contextlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sapt_jax.config import SETTINGS, default_config, unknown_fields
from sapt_jax.settings import shown

_FLAG = "config."
_PACKAGE = str(Path(__file__).parent)
_REPORT = (
    "This is an error of sapt_jax itself. Nothing that it had saved is lost. Please report it, with the command and "
    "the lines above."
)


@contextlib.contextmanager
def told_in_one_line(name: str = "error", code: int = 1, verbose: bool = False) -> Iterator[None]:
    """Ends the command with one message on stderr where its user can mend what is wrong.

    That is so of what this package raised itself, and of files, missing packages and steps that were not finite. Any
    other error keeps its traceback, which ends with the wish for a report.

    Args:
      name: what the message begins with.
      code: the exit status.
      verbose: such errors keep their traceback too.
    """
    try:
        yield
    except Exception as error:
        if not _can_be_mended(error):
            error.add_note(_REPORT)
            raise
        if verbose:
            raise
        if code == 1:
            sys.exit(f"{name}: {error}")
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(code)


def load_config(address: str) -> ConfigDict:
    """The config of a file FILE or FILE:ARGUMENT; "" is the default one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no config, with the line where it fails.
    """
    if not address:
        return default_config()
    name, colon, argument = address.partition(":")
    given = f"--config={address}"
    if not Path(name).is_file():
        raise FileNotFoundError(f"{given}: {name} does not exist. Give a file of configs/, or one like them.")
    spec = importlib.util.spec_from_file_location("config_file", name)
    if spec is None or spec.loader is None:
        raise ValueError(f"{given}: {name} is no Python file. Give a file of configs/, or one like them.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if colon else module.get_config()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{given}: {_fault_in(error, name)}") from None
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{given}: get_config returns a {type(config).__name__}, and must return a ConfigDict.")
    return config


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, whose errors become one line each; a parser for `app.run`."""
    with told_in_one_line():
        arguments = [argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")]
        names = [argument.split("=")[0] for argument in arguments]
        if problems := unknown_fields(name.removeprefix(_FLAG) for name in names if name.startswith(_FLAG)):
            raise ValueError("\n".join(problems))
        if address := _value_of("config", argv):
            load_config(address)
        try:
            return flags.FLAGS(list(argv))
        except flags.Error as error:
            raise ValueError(_in_our_words(str(error), arguments)) from None


def _in_our_words(message: str, arguments: Sequence[str]) -> str:
    """absl's message, where it is about the value of a setting in the form that `Setting.problem` has."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        setting = SETTINGS.get(name.removeprefix(_FLAG))
        if setting and equals and name.startswith(_FLAG) and message.startswith(f"flag --{argument}: "):
            wanted = setting.of_type or type(setting.default)
            return f"{name}={shown(value)} must be of type {wanted.__name__}."
    if missing := re.search(r"Flag (--\w+) must have a value", message):
        return f"{missing[1]} is missing; --help says what it is."
    return message.replace("\n", " ")


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if equals else following
    return None


def _fault_in(error: BaseException, name: str) -> str:
    """What went wrong in a config file, and where."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} of {error.filename}: {error.msg}"
    if isinstance(error, AttributeError) and "'get_config'" in str(error):
        return f"{name} has no function get_config, which must return the config."
    if isinstance(error, TypeError) and "get_config() takes 0 positional arguments" in str(error):
        return f"get_config of {name} takes no argument: leave out what stands after the colon."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    # What a config says of its argument is a whole sentence.
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"line {lines[-1]}: {kind}{error}" if lines and kind else f"{kind}{error}"


def _can_be_mended(error: BaseException) -> bool:
    if isinstance(error, OSError | ImportError | FloatingPointError):
        return True
    raised_in = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return isinstance(error, ValueError) and bool(raised_in) and raised_in[-1].startswith(_PACKAGE)
