"""EWC's Fisher and penalty against loops in float64, and a run that is stopped and goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.methods.ewc import Ewc
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Prompt
from sapt_jax.programs import make_apply
from tests.helpers.run_files import assert_same_arrays, committed, predictions
from tests.helpers.stopped import run_stopped_once
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.training import batch_of, train
from tests.helpers.trees import at, empty_frozen, fresh, init_base, noise

MODELS = {name: make_model(VARIANTS[name], "float32", "none") for name in ("llama-tiny", "t5-tiny")}
WIDTH, TOKENS = MODELS["llama-tiny"].config.d_model, 7


def make_batch(seed, rows, fillers=0):
    """Rows of different lengths, and some that only fill the batch up."""
    rng, batch = np.random.default_rng(seed), batch_of(seed, rows)
    batch["target_mask"] = np.arange(5) < rng.integers(1, 6, (rows, 1))
    for name in ("source_mask", "target_mask"):
        batch[name][rows - fillers :] = False
    return batch


def random_state(method, model, base, seed):
    frozen, trainable = empty_frozen(method, model, base, 1), fresh(method, model, base, seed)
    positive = jax.tree.map(jnp.abs, noise(seed + 1, frozen.memory))
    frozen = frozen.replace(bank=noise(seed, frozen.bank), memory=positive)
    return frozen, trainable.replace(slot=noise(seed + 2, trainable.slot))


@pytest.mark.slow
@pytest.mark.parametrize("row_loss", ["sum", "mean"])
def test_squared_gradients_of_a_softmax_on_a_prompt_equal_numpy(row_loss):
    """Logits that are linear in the prompt, so that gradients can be written out."""
    method = Ewc(Prompt(2), row_loss=row_loss, rows_at_once=4)
    table, out = (np.random.default_rng(1).normal(size=shape) for shape in ((100, WIDTH), (2, WIDTH, TOKENS)))

    def apply(base, source, *rest, method=None, rng=None):
        embedded = jnp.asarray(table, jnp.float32)[source]
        if method == "embed":
            return embedded
        return embedded @ jnp.asarray(out[0], jnp.float32) + jnp.einsum("BPD,PDV->BV", rest[3].prompt, out)[:, None]

    base = {"token_embedder": {"embedding": jnp.asarray(table, jnp.float32)}}
    frozen, trainable = random_state(method, MODELS["llama-tiny"], base, 2)
    batch = make_batch(3, rows=6, fillers=1)
    batch["target"] %= TOKENS
    found = method.measure(apply, frozen, trainable, batch, at(1, slot=0))
    prompt, squares = np.array(trainable.slot["prompt"], np.float64), np.zeros((2, WIDTH))
    for row in range(5):
        logits = table[batch["source"][row]] @ out[0] + np.einsum("PD,PDV->V", prompt, out)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        tokens = np.flatnonzero(batch["target_mask"][row])
        of_logits = sum(probabilities[i] - np.eye(TOKENS)[batch["target"][row, i]] for i in tokens)
        squares += (out @ of_logits / (len(tokens) if row_loss == "mean" else 1)) ** 2
    assert found["rows"] == 5
    np.testing.assert_allclose(found["squares"]["prompt"], squares, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_rows_count_one_by_one_and_not_as_their_mean(name):
    method, model = Ewc(Lora(2, 8.0), rows_at_once=2), MODELS[name]
    base = init_base(model)
    frozen, trainable = random_state(method, model, base, 3)
    apply, batch, task = make_apply(model), make_batch(4, rows=4, fillers=1), at(1, slot=0)

    def gradient(rows):
        def loss(slot):
            moved = trainable.replace(slot=slot)
            return method.task_loss(apply, jax.random.key(0), frozen, moved, rows, task)[0]

        return jax.tree.map(lambda x: np.array(x, np.float64), jax.grad(loss)(trainable.slot))

    found = jax.jit(lambda batch: method.measure(apply, frozen, trainable, batch, task))(batch)
    singly = [gradient({key: x[row : row + 1] for key, x in batch.items()}) for row in range(3)]
    squares = jax.tree.map(lambda *grads: sum(grad**2 for grad in grads), *singly)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), found["squares"], squares)
    of_mean = jax.tree.map(lambda x: x**2, gradient(batch))
    assert any(
        np.abs(x - y).max() > 0.1 * y.max() for x, y in zip(*map(jax.tree.leaves, (of_mean, squares)), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_equals_a_loop_and_is_nothing_where_the_task_before_ended(name):
    method, model = Ewc(Lora(2, 8.0), strength=0.7), MODELS[name]
    frozen, trainable = random_state(method, model, init_base(model), 5)

    def penalty(slot):
        return method.penalty(jax.random.key(0), frozen, trainable.replace(slot=slot), None, at(1, slot=0))

    before = method.pet.read(frozen.bank, 0)
    trees = (frozen.memory["fisher"], trainable.slot, before)
    leaves = [[np.array(x, np.float64) for x in jax.tree.leaves(tree)] for tree in trees]
    drift = sum(np.sum(f * (own - old) ** 2) for f, own, old in zip(*leaves, strict=True)) / 2
    (loss, logs), grads = jax.value_and_grad(penalty, has_aux=True)(trainable.slot)
    np.testing.assert_allclose(logs["drift"], drift, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.7 * drift, rtol=1e-5)
    for grad, f, own, old in zip(jax.tree.leaves(grads), *leaves, strict=True):
        np.testing.assert_allclose(grad, 0.7 * f * (own - old), rtol=1e-4, atol=1e-6)
    (loss, _), grads = jax.value_and_grad(penalty, has_aux=True)(before)
    assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["sum", "mean"])
def test_the_fisher_of_three_tasks_is_their_sum_or_their_mean(accumulation):
    method, model = Ewc(Lora(2, 8.0), accumulation=accumulation), MODELS["llama-tiny"]
    frozen = empty_frozen(method, model, {}, 1)
    trainable, squares = fresh(method, model, {}, 0), []
    for task, rows in enumerate((3, 5, 2)):
        squares.append(jax.tree.map(lambda x: jnp.square(x) * 9, noise(task, trainable.slot)))
        trainable = trainable.replace(slot=noise(task + 7, trainable.slot))
        found = {"squares": squares[-1], "rows": jnp.float32(rows)}
        frozen = method.end_task(frozen, trainable, found, at(task, slot=0, steps=0))
    expected = jax.tree.map(lambda x, y, z: np.float64(x) / 3 + np.float64(y) / 5 + np.float64(z) / 2, *squares)
    share = 1 if accumulation == "sum" else 3
    jax.tree.map(
        lambda found, want: np.testing.assert_allclose(found, want / share, rtol=1e-5, atol=1e-6),
        frozen.memory["fisher"],
        expected,
    )
    jax.tree.map(np.testing.assert_array_equal, method.pet.read(frozen.bank, 0), trainable.slot)


@pytest.mark.slow
def test_a_strong_penalty_holds_the_block():
    model = MODELS["llama-tiny"]
    base, drifts = init_base(model), []
    for strength in (0.0, 1e6):
        method = Ewc(Lora(2, 8.0), strength=strength)
        frozen, trainable = random_state(method, model, base, 6)
        start = trainable.replace(slot=method.pet.read(frozen.bank, 0))
        _, metrics = train(method, model, (frozen, start), at(1, slot=0), steps=8)
        drifts.append(float(metrics["drift"]))
    assert drifts[1] < 0.3 * drifts[0]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_what_it_measured(tmp_path, monkeypatch):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    overrides = {"method": "ewc", "task_order": "shout,mirror", "train.epochs": 1, "ewc.fisher_rows": 10}
    config = tiny_config(data_dir, **overrides)
    measured = []
    with monkeypatch.context() as patch:
        sum_batches = continual.sum_batches
        patch.setattr(
            continual, "sum_batches", lambda f, rows, *at: measured.append(len(rows)) or sum_batches(f, rows, *at)
        )
        scores = continual.run(config, tmp_path / "whole")
    assert measured == [10, 10]
    assert not scores["protocol"]["needs_task_id"]
    whole = committed(tmp_path / "whole")
    fishers = [
        [x for name, x in arrays.items() if name.startswith("['memory']['fisher']")] for arrays in whole.values()
    ]
    assert len(fishers[0]) == 4
    for first, last in zip(*fishers, strict=True):
        assert first.any() and (first >= 0).all() and (last >= first).all() and (last > first).any()
    again = run_stopped_once(config, tmp_path / "stopped", monkeypatch)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert_same_arrays(committed(tmp_path / "stopped"), whole)
    assert predictions(tmp_path / "stopped") == predictions(tmp_path / "whole")
