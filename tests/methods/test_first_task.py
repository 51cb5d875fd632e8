"""The first task is sequential training, bit for bit, for methods that nothing else acts in yet."""

import functools

import jax
import numpy as np
import pytest

from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Prompt
from tests.helpers.tiny import tiny_method
from tests.helpers.training import train
from tests.helpers.trees import at, empty_frozen, fresh, init_base

pytestmark = pytest.mark.slow

MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
BASE = init_base(MODEL)
KINDS = {"lora": Lora(2, 8.0), "prompt": Prompt(3)}
METHODS = {
    "inc_lora": KINDS,
    "ewc": KINDS,
    "single_task": KINDS,
    "o_lora": ["lora"],
    "ella": ["lora"],
    "slao": ["lora"],
}


@functools.cache
def after_one_task(name, kind):
    method = tiny_method(name, pet=KINDS[kind])
    trees = empty_frozen(method, MODEL, BASE, 1), fresh(method, MODEL, BASE, 3)
    return train(method, MODEL, trees, at(0))[0]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in METHODS.items() for kind in kinds])
def test_the_first_task_is_sequential_training(name, kind):
    jax.tree.map(np.testing.assert_array_equal, after_one_task("sequential", kind), after_one_task(name, kind))
