"""Serves a finished run, or one that still learns, in the form of OpenAI's API.

    python -m sapt_jax.serve --run=runs/mine --port=8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "what a lovely day"}'

It listens on this machine alone unless --host says otherwise; --token_file names a file with a token that every request
then has to bear.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from sapt_jax.ask.model import load
from sapt_jax.command_line import told_in_one_line
from sapt_jax.serve.app import Options, make_app

_NUMBERS = {"queue": int, "timeout": float, "most_bytes": int, "most_tokens": int, "reload": float}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m sapt_jax.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument("--run", required=True, help="the --workdir of a run")
    parser.add_argument("--base", default="", help="where the base model lies now, if not where the run found it")
    parser.add_argument("--host", default="127.0.0.1", help="an address of this machine; 0.0.0.0 is all of them")
    parser.add_argument("--port", type=int, default=8000, help="0 chooses a free one")
    parser.add_argument("--name", default=defaults.name, help="what the model is called in responses")
    parser.add_argument("--token_file", type=Path, help="holds the token that requests have to bear")
    for name, kind in _NUMBERS.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"see serve.app.Options; {default:g}")
    given = parser.parse_args(arguments)
    with told_in_one_line("sapt_jax.serve", code=2):
        token = given.token_file.read_text(encoding="utf-8").strip() if given.token_file else ""
        if given.token_file and not token:
            raise ValueError(f"--token_file={given.token_file} is empty: write the token into it.")
        numbers = {name: getattr(given, name) for name in _NUMBERS}
        for name, value in numbers.items():
            if not (value > 0 or (name == "reload" and value == 0)):
                raise ValueError(f"--{name}={value:g} must be positive.")
        options = dataclasses.replace(defaults, name=given.name, token=token, **numbers)
        app = make_app(load(given.run, given.base), options)
    uvicorn.run(app, host=given.host, port=given.port, log_level="info", timeout_keep_alive=30)


if __name__ == "__main__":
    sys.exit(main())
