"""Makes launch/sapt_jax_colab.ipynb of its source: text is a Markdown cell, a block of Python a code cell.

python launch/build_notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("sapt_jax_colab.md")
_KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook(text: str) -> dict[str, Any]:
    """The notebook of a source, in nbformat 4.5, without outputs."""
    cells = []
    for number, part in enumerate(re.split(r"^```(?:python)?\n", text, flags=re.MULTILINE)):
        if part.strip():
            cell = {"id": f"cell-{number}", "metadata": {}, "source": part.strip().splitlines(keepends=True)}
            code = {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append({**cell, **(code if number % 2 else {"cell_type": "markdown"})})
    metadata = {"kernelspec": _KERNEL, "language_info": {"name": "python"}, "accelerator": "GPU"}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    text = json.dumps(notebook(SOURCE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    SOURCE.with_suffix(".ipynb").write_text(text, encoding="utf-8")
