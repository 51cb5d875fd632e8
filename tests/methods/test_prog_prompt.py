"""Progressive prompts: which prompts an input gets, in which order, and that the others change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.methods.prog_prompt import ProgPrompt
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Mixture, Prompt
from sapt_jax.programs import make_apply
from tests.helpers.run_files import committed
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

LENGTH, TASKS = 3, 4
METHOD = ProgPrompt(Prompt(LENGTH))
MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
BASE = {"token_embedder": {"embedding": jnp.ones((9, MODEL.config.d_model))}}


def trees(seed, model=MODEL, base=BASE):
    frozen = random_frozen(METHOD, model, base, TASKS, seed)
    trainable = fresh(METHOD, model, base, seed)
    return frozen, trainable.replace(slot=noise(seed + 9, trainable.slot))


def mixture_of(frozen, trainable, slot, rows, training=False):
    task = at(slot, rows=jnp.asarray(rows, jnp.int32))
    weights = METHOD.weights(frozen, trainable, jnp.zeros((3, 1)), task, training)
    return METHOD.mixture(frozen, trainable, weights, task)


def written_out(frozen, trainable, slot, row):
    """[P_row, ..., P_0] without the withdrawn ones."""
    bank = np.array(frozen.bank["prompt"], np.float64)
    bank[slot] = np.array(trainable.slot["prompt"])
    return np.concatenate([bank[i] for i in range(row, -1, -1) if frozen.enabled[i]])


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [(True,) * TASKS, (True, False, True, True)])
def test_rows_get_the_prompts_up_to_their_task_newest_first(enabled):
    frozen, trainable = trees(0)
    frozen = frozen.replace(enabled=jnp.asarray(enabled))
    mixture = mixture_of(frozen, trainable, 3, rows=[0, 2, 3])
    assert mixture.prompt.shape == (3, METHOD.prompt_length(TASKS), MODEL.config.d_model)
    for place, row in enumerate((0, 2, 3)):
        expected = written_out(frozen, trainable, 3, row)
        idle = TASKS * LENGTH - len(expected)
        assert mixture.prompt_mask[place].tolist() == [False] * idle + [True] * len(expected)
        np.testing.assert_allclose(mixture.prompt[place, idle:], expected, rtol=1e-6)


def test_no_row_gets_the_prompts_of_slots_that_are_not_learned():
    frozen, trainable = trees(1)
    mask = mixture_of(frozen, trainable, 1, rows=3).prompt_mask
    assert mask.sum(axis=1).tolist() == [2 * LENGTH] * 3


@pytest.mark.slow
def test_gradients_reach_the_prompt_in_training_alone():
    frozen, trainable = trees(2)
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(3, TASKS * LENGTH, MODEL.config.d_model)), jnp.float32)

    def total(bank, slot):
        mixture = mixture_of(frozen.replace(bank=bank), trainable.replace(slot=slot), 2, rows=2, training=True)
        return jnp.sum(mixture.prompt * mixture.prompt_mask[..., None] * weight)

    of_bank, of_slot = jax.grad(total, argnums=(0, 1))(frozen.bank, trainable.slot)
    assert not np.any(of_bank["prompt"])
    # The row is P_3, which takes no part, and P_2 P_1 P_0.
    np.testing.assert_allclose(of_slot["prompt"], weight[:, LENGTH : 2 * LENGTH].sum(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny"])
def test_answers_to_a_task_do_not_change_when_later_slots_are_filled(name):
    model = make_model(VARIANTS[name], "float32", "none")
    base = init_base(model)
    apply = make_apply(model)
    frozen, trainable = trees(4, model, base)
    rng = np.random.default_rng(5)
    lengths = np.array([4, 6, 2])
    mask = np.arange(6) >= 6 - lengths[:, None] if model.padding_side == "left" else np.arange(6) < lengths[:, None]
    source, target = (rng.integers(3, 90, (3, n)).astype(np.int32) for n in (6, 4))
    answers = (source, mask, target, np.ones(target.shape, bool))
    logits = jax.jit(lambda mixture: apply(base, *answers, mixture))
    early = frozen.replace(bank={"prompt": frozen.bank["prompt"].at[2:].set(0.0)})
    before = logits(mixture_of(early, trainable, 1, rows=[0, 1, 1]))
    later = frozen.replace(bank={"prompt": frozen.bank["prompt"].at[1].set(trainable.slot["prompt"])})
    newest = trainable.replace(slot=noise(6, trainable.slot))
    np.testing.assert_allclose(logits(mixture_of(later, newest, 3, rows=[0, 1, 1])), before, atol=2e-5)
    # As if there were no other slots.
    alone = jnp.asarray(written_out(early, trainable, 1, 1), jnp.float32)
    np.testing.assert_allclose(
        logits(Mixture(prompt=jnp.broadcast_to(alone, (3, *alone.shape))))[1:], before[1:], atol=2e-5
    )
    assert np.abs(logits(mixture_of(later, newest, 3, rows=3)) - before).max() > 1e-2


def test_blocks_other_than_prompts_are_refused():
    with pytest.raises(ValueError, match="config.method='prog_prompt' .* set config.pet.kind='prompt'"):
        ProgPrompt(Lora(2, 8.0))


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    overrides = {"method": "prog_prompt", "pet.kind": "prompt", "pet.prompt_length": LENGTH, "train.epochs": 1}
    config = tiny_config(write_tasks(tmp_path / "data"), task_order="shout,mirror", **overrides)
    scores = continual.run(config, tmp_path / "run")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    assert scores["protocol"]["needs_task_id"] is True
    # What is told of the first task is the same after the second: its prompts are.
    assert scores["matrix"][0][0] == scores["matrix"][1][0]
    assert all((source + 2 * LENGTH) % 16 == 0 for source, _ in scores["buckets"])
    first, last = committed(tmp_path / "run").values()
    np.testing.assert_array_equal(first["['bank']['prompt']"][0], last["['bank']['prompt']"][0])
    assert np.any(last["['bank']['prompt']"][1]) and not np.any(first["['bank']['prompt']"][1])
