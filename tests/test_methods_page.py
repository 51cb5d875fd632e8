"""docs/methods.md has every method, and says of it what its file says."""

import pytest

from sapt_jax.methods import METHODS
from sapt_jax.pet import Lora, Prompt
from tests.helpers.methods_page import rows
from tests.helpers.tiny import tiny_method

ROWS = rows()


def make(name):
    kind = METHODS[name].only[0] if METHODS[name].only else "lora"
    return tiny_method(name, pet=Prompt(2) if kind == "prompt" else Lora(2, 8.0))


def test_every_method_has_a_row():
    assert METHODS.keys() <= ROWS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_what_the_method_says(name):
    row, method = ROWS[name], make(name)
    assert row["told"] == ("yes" if method.needs_task_id else "no")
    assert row["blocks"] == ({"lora": "LoRA", "prompt": "prompt"}[method.only[0]] if method.only else "LoRA, prompt")
    sees = "none" if method.old_data("train") == "none" else "inputs" if method.samples == "inputs" else "rows"
    assert row["old data"] == sees
    assert row["line"] and row["keeps"]
