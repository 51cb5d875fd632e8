"""Which methods leave by which command, as docs/methods.md says; the others are refused in one clear line."""

import re

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="two of the commands write for PyTorch")
pytest.importorskip("transformers", reason="the base model is one of transformers")

from sapt_jax.config import make_method  # noqa: E402
from sapt_jax.export import reference, to_hf, to_peft, to_torch  # noqa: E402
from sapt_jax.export.learned import Learned, declared_state, slot_names  # noqa: E402
from sapt_jax.methods import METHODS  # noqa: E402
from sapt_jax.models.families import read_shape  # noqa: E402
from sapt_jax.state import is_leaf  # noqa: E402
from tests.helpers.learned_runs import TASKS, make_base, make_config  # noqa: E402
from tests.helpers.methods_page import rows  # noqa: E402

pytestmark = pytest.mark.slow

ROWS = rows()
WRITERS = {
    "to-peft": lambda learned, weights, out: to_peft.write_mixture(learned, weights, out),
    "to-hf": lambda learned, weights, out: to_hf.write_merged(learned, weights, out),
    "to-torch": lambda learned, weights, out: to_torch.write_model(learned, True, out),
    "to-reference": lambda learned, weights, out: reference.write_saved(learned, out),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    make_base("llama", folder)
    return folder


def learned_by(name, base, kind):
    """Three tasks' worth of random blocks."""
    config, shape = make_config(base, kind, method=name), read_shape(str(base), "")
    method, rng = make_method(config), np.random.default_rng(0)
    slots = slot_names(method, TASKS)

    def draw(leaf):
        return rng.standard_normal(leaf.shape).astype(np.float32)

    frozen, trainable = jax.tree.map(draw, declared_state(config, shape, len(slots)), is_leaf=is_leaf)
    return Learned(config, shape, TASKS, slots, frozen.replace(enabled=np.ones(len(slots), bool)), (trainable,) * 3)


def ways_out(learned, folder):
    """(What a run leaves by, with a mark where weights must be given; the refusals of the rest)."""
    ways, refusals = set(), {}
    one = np.eye(len(learned.slots))[0].tolist()
    for command, write in WRITERS.items():
        for weights, mark in ((None, ""), (one, "†")):
            try:
                write(learned, weights, folder / f"{command}{mark}")
            except ValueError as error:
                refusals[command] = str(error)
            else:
                ways.add(command + mark)
                refusals.pop(command, None)
                break
    return ways, refusals


@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_by_what_the_page_says(name, base, tmp_path):
    kind = METHODS[name].only[0] if METHODS[name].only else "lora"
    ways, refusals = ways_out(learned_by(name, base, kind), tmp_path)
    assert ways == set(re.findall(r"to-\w+†?", ROWS[name]["leaves by"]))
    for message in refusals.values():
        assert f"config.method={name!r}" in message or "soft prompt" in message
        assert "\n" not in message


def test_a_prompt_is_never_merged(base, tmp_path):
    ways, refusals = ways_out(learned_by("inc_lora", base, "prompt"), tmp_path)
    assert ways == {"to-peft", "to-torch"}
    assert "cannot be merged: to-peft writes it as an adapter, to-torch with the whole model" in refusals["to-hf"]
