"""Whether a name that comes from a file or a setting may become a part of a path."""

import unicodedata
from typing import Any

# Control characters, halves of a pair, and what ends a line.
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")
# File systems take 255 bytes; our own numbers and endings stand around a name.
_MOST_BYTES = 200


def check_name(name: Any, where: str) -> str:
    """Returns a name that is one file or folder of the place it is put into, and leads nowhere else.

    Whatever reads a name from a file or a setting and makes a path of it asks here first: task names, the shards that
    an index lists.

    Args:
      where: the file and field, or config.NAME=VALUE, that the error begins with.

    Raises:
      ValueError: it is no text, empty, of dots alone, longer than file systems take, or holds a slash, a backslash or a
        control character.
    """
    if not isinstance(name, str):
        fault = f"is a {type(name).__name__}, not text"
    elif not name.strip(". "):
        fault = "names no file of its own"
    elif "/" in name or "\\" in name:
        fault = "holds a slash, which leads to another folder"
    elif any(unicodedata.category(character) in _UNSEEN for character in name):
        fault = "holds a control character"
    elif len(name.encode("utf-8")) > _MOST_BYTES:
        fault = f"is longer than {_MOST_BYTES} bytes"
    else:
        return name
    raise ValueError(f"{where}: {_shortened(repr(name))} {fault}. Give it the plain name of one file or folder.")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
