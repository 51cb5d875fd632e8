"""The table of docs/methods.md, as tests hold it against the methods."""

import re

from tests.helpers.paths import REPOSITORY

COLUMNS = ("method", "line", "paper", "told", "old data", "keeps", "blocks", "leaves by")


def rows():
    """{method: {column: text}}."""
    table = {}
    page = (REPOSITORY / "docs/methods.md").read_text(encoding="utf-8")
    for line in page.partition("\n## ")[0].splitlines():
        if re.match(r"\| `\w+` \|", line):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            assert len(cells) == len(COLUMNS), line
            row = dict(zip(COLUMNS, cells, strict=True))
            table[row["method"].strip("`")] = row
    return table
