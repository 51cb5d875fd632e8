"""What a method keeps, counted by hand, and how labels are shown."""

import numpy as np
import pytest

from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.models.families import VARIANTS, make_model, parameters
from sapt_jax.pet import Prompt
from sapt_jax.results.labels import count_kept, format_bytes, one_line, short
from sapt_jax.state import Leaf
from tests.helpers.tiny import tiny_method

# Width 32, two layers, four query and two value heads of 8: LoRA's factors of rank 2 on query and value.
PARAMETERS = parameters(make_model(VARIANTS["llama-tiny"], "float32", "none"))
BLOCK = sum(
    2 * 2 * (x.shape[1] + x.shape[2])
    for name, x in PARAMETERS.items()
    if name.endswith(("query/kernel", "value/kernel"))
)
D = 32
KEPT = {
    "sequential": BLOCK,
    "inc_lora": 3 * BLOCK,
    # And the working block.
    "slao": 2 * BLOCK,
    # And the Fisher.
    "ewc": 2 * BLOCK,
    # And means, covariance and precision.
    "epi": 3 * BLOCK + 3 * D + 2 * D * D,
    # Keys, targets, the own key, and the projection with its norm.
    "sapt": 3 * BLOCK + 3 * D + 9 + D + 2 * 6 * D + 2 * D,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_three_tasks_leave(name):
    method = tiny_method(name)
    kept = count_kept(method.kept_leaves(PARAMETERS, method.capacity(3)), ())
    assert kept == {"parameters": KEPT[name], "bytes": 4 * KEPT[name]}


def test_a_pool_of_prompts_and_its_keys():
    method = tiny_method("l2p", pet=Prompt(5), size=7, chosen=2)
    assert count_kept(method.kept_leaves(PARAMETERS, 1), ())["parameters"] == 7 * 5 * D + 7 * D


def test_bytes_are_those_of_every_entry_and_of_token_ids():
    pool = EncodedSplit(Ragged.from_rows([[1, 2, 3], [4]]), Ragged.from_rows([[], [5, 6]]), 0, 0)
    leaves = {"half": Leaf((2, 3), (None, None), dtype=np.float16), "flag": Leaf((5,), (None,), dtype=bool)}
    assert count_kept(leaves, [pool, pool]) == {"parameters": 11, "bytes": 6 * 2 + 5 + 2 * 6 * 4}


def test_labels_are_short():
    labels = {"needs_task_id": True, "routing": "method", "old_data": "none", "rows": 0, "parameters": 5, "bytes": 20}
    assert short(labels) == {"told the task": "yes", "old data": "none", "kept": "20 B"}
    changed = labels | {"needs_task_id": False, "routing": "oracle", "old_data": "authors'", "rows": 12}
    assert short(changed) == {"told the task": "oracle", "old data": "authors', 12 rows", "kept": "20 B"}
    assert set(short({}).values()) == {"–"}
    assert one_line(changed) == "told the task: oracle; old data: authors', 12 rows; kept: 20 B"


@pytest.mark.parametrize(
    "number, text", [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (4e16, "4e+04 TB")]
)
def test_bytes_are_read_at_a_glance(number, text):
    assert format_bytes(int(number)) == text
