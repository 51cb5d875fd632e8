"""One command for all that the package does: `sapt NAME ...`, or `python -m sapt_jax NAME ...`."""

import runpy
import sys
from collections.abc import Sequence

from sapt_jax.data.sources.task_files import nearest_name

# What each runs as its own program, what it does, and an example.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": (
        "sapt_jax.main",
        "teaches a model a sequence of tasks",
        "--config=configs/smollm2_superni.py --workdir=runs/a",
    ),
    "study": (
        "sapt_jax.study",
        "methods, orders and seeds, in one table",
        "--config=configs/studies/demo.py --workdir=runs/study",
    ),
    "predict": ("sapt_jax.predict", "answers with a finished run", "--run=runs/a --input=rows.jsonl"),
    "serve": ("sapt_jax.serve", "answers over HTTP, as OpenAI's clients ask", "--run=runs/a --port=8000"),
    "report": ("sapt_jax.report", "one page of figures of runs", "runs/a runs/b --out=report.html"),
    "compare": ("sapt_jax.compare", "runs side by side in the terminal", "runs/a runs/b"),
    "inspect": ("sapt_jax.tools.inspect_data", "what a config's data look like", "--config=configs/smollm2_superni.py"),
    "convert": ("sapt_jax.convert", "weights in, what was learned out", "to-peft --run=runs/a --all --out=adapters"),
    "check": (
        "sapt_jax.tools.compile_check",
        "whether a run fits hardware that is not here",
        "--config=configs/t5_xl_superni.py --topology=v5p:2x2x2",
    ),
}


def usage() -> str:
    """Every command with what it does and an example."""
    width = max(map(len, COMMANDS))
    lines = ["usage: sapt COMMAND ..., and sapt COMMAND --help", ""]
    for name, (_, purpose, example) in COMMANDS.items():
        lines += [f"  {name:{width}}  {purpose}", f"  {'':{width}}  sapt {name} {example}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that is named first with the rest, or prints what there is."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"sapt: there is no command {name!r}. {nearest_name(name, COMMANDS)}", file=sys.stderr)
        return 2
    module, *_ = COMMANDS[name]
    sys.argv = [f"sapt {name}", *rest]
    # As python -m has it: configs import one another from the folder that one stands in.
    sys.path.insert(0, "")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
