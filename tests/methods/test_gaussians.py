"""Gaussians in place of pseudo-samples: the fit, what is drawn from it, and the run that keeps nothing else."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual, state
from sapt_jax.config import check_config, make_method
from sapt_jax.methods import METHODS, Method, gaussians
from sapt_jax.methods.reflection import reflection_loss
from sapt_jax.models.families import VARIANTS, make_model, parameters
from tests.helpers.run_files import assert_same_arrays, committed
from tests.helpers.tiny import tiny_config, tiny_method, write_tasks
from tests.helpers.trees import at, empty_frozen, fresh

MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
WIDTH, TASKS, RANK = MODEL.config.d_model, 3, 2
BASE = {"token_embedder": {"embedding": jnp.zeros((5, WIDTH))}}
STATISTICS = {"pseudo_samples.source": "statistics", "pseudo_samples.statistics_rank": 3}


def correlated(seed, rows, width):
    """Features with a few strong directions, as float32 from the device."""
    rng = np.random.default_rng(seed)
    strong = rng.normal(size=(rows, 3)) @ rng.normal(0, 2.0, (3, width))
    return (5.0 + strong + rng.normal(0, 0.3, (rows, width))).astype(np.float32)


@pytest.mark.parametrize(("rows", "width"), [(60, 7), (6, 9), (3, 9), (1, 4)])
def test_the_fit_is_the_covariance_s_leading_part_and_its_exact_variances(rows, width):
    features, rank = correlated(rows, rows, width), 4
    found = gaussians.fit(features, rank)
    exact = features.astype(np.float64)
    mean = np.array([sum(column) / rows for column in exact.T])
    covariance = sum(np.outer(row - mean, row - mean) for row in exact) / rows
    values, vectors = np.linalg.eigh(covariance)
    leading = sum(values[i] * np.outer(vectors[:, i], vectors[:, i]) for i in np.argsort(values)[-rank:])
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-13)
    scale = max(np.abs(covariance).max(), 1.0)
    np.testing.assert_allclose(found["factor"] @ found["factor"].T, leading, atol=1e-12 * scale)
    whole = found["factor"] @ found["factor"].T + np.diag(found["diagonal"])
    np.testing.assert_allclose(np.diag(whole), np.diag(covariance), atol=1e-12 * scale)
    assert found["factor"].shape == (width, rank) and (found["diagonal"] >= 0).all()
    if rank >= min(rows - 1, width):
        np.testing.assert_allclose(whole, covariance, atol=1e-12 * scale)


@pytest.mark.slow
def test_what_is_drawn_has_the_fitted_moments():
    fits = [gaussians.fit(correlated(seed, 50, 6), RANK) for seed in range(2)]
    stacked = {name: jnp.asarray(np.stack([fit[name] for fit in fits]), jnp.float32) for name in fits[0]}
    number = 200_000
    drawn = np.asarray(gaussians.draw(jax.random.key(0), stacked, number), np.float64)
    assert drawn.shape == (2, number, 6)
    for own, fit in zip(drawn, fits, strict=True):
        covariance = fit["factor"] @ fit["factor"].T + np.diag(fit["diagonal"])
        deviation = np.sqrt(np.diag(covariance))
        # Five standard errors of a mean, and of a covariance's entry.
        np.testing.assert_array_less(np.abs(own.mean(axis=0) - fit["mean"]), 5 * deviation / number**0.5)
        error = 5 * np.outer(deviation, deviation) * (2 / number) ** 0.5
        np.testing.assert_array_less(np.abs(np.cov(own.T, bias=True) - covariance), error)
    # Tasks, steps and the two parts of a draw have numbers of their own.
    again = np.asarray(gaussians.draw(jax.random.key(1), stacked, 4))
    assert not np.isclose(again, drawn[:, :4]).any()
    whitened = (drawn[:, :1000] - drawn.mean(axis=1, keepdims=True)) / drawn.std(axis=1, keepdims=True)
    assert abs(np.mean(whitened[0] * whitened[1])) < 0.1


def after_two_tasks():
    method = tiny_method(statistics=RANK, reflection_batch=5)
    frozen, trainable = empty_frozen(method, MODEL, BASE, TASKS), None
    rng = np.random.default_rng(0)
    for task in range(2):
        trainable = fresh(method, MODEL, BASE, task, previous=trainable)
        totals = {"attention": np.array([4.0, 4.0 * task, 0.0]), "rows": np.float64(4 + 4 * task)}
        features = rng.normal(task, 1.0, (9, WIDTH)).astype(np.float32)
        found = method.summarise({}, totals | {"features": features})
        found = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)
        frozen = method.end_task(frozen, trainable, found, at(task))
    return method, frozen, fresh(method, MODEL, BASE, 7, previous=trainable)


@pytest.mark.slow
def test_the_reflection_loss_is_that_of_drawn_features():
    method, frozen, trainable = after_two_tasks()
    loss, logs = method.penalty(jax.random.key(3), frozen, trainable, None, at(2))
    drawn = gaussians.draw(jax.random.key(3), frozen.memory["statistics"], 5)
    current = method.log_weights(frozen, trainable, drawn, at(2))
    everywhere = jnp.ones((TASKS, 5), bool)
    expected, by_task = reflection_loss(frozen.memory["reflection_targets"], current, everywhere, jnp.int32(2))
    np.testing.assert_allclose(loss, method.kl_ratio * expected, rtol=1e-6)
    assert by_task[0] > 0 and by_task[1] > 0 and by_task[2] == 0
    gradient = jax.grad(lambda t: method.penalty(jax.random.key(3), frozen, t, None, at(2))[0])(trainable)
    assert np.any(gradient.selector["key"])
    # The second task's Gaussian took the place of none but its own.
    np.testing.assert_allclose(frozen.memory["statistics"]["mean"][:, 0].round(), [0, 1, 0])


def test_statistics_are_kept_and_measured_only_where_they_are_asked_for():
    parts = parameters(MODEL)
    plain, asked = tiny_method(), tiny_method(statistics=RANK)
    assert set(plain.memory(parts, TASKS)) == {"keys", "reflection_targets"} and not plain.features_after
    assert plain.samples == "inputs" and asked.samples is None and asked.features_after
    assert {name: leaf.shape for name, leaf in asked.memory(parts, TASKS)["statistics"].items()} == {
        "mean": (TASKS, WIDTH),
        "factor": (TASKS, WIDTH, RANK),
        "diagonal": (TASKS, WIDTH),
    }
    # Without a reflection loss nothing draws from them.
    idle = tiny_method(statistics=RANK, kl_ratio=0.0)
    assert set(idle.memory(parts, TASKS)) == {"keys", "reflection_targets"} and not idle.features_after
    assert (asked.old_data("statistics"), plain.old_data("train"), idle.old_data("statistics")) == (
        "statistics",
        "real",
        "none",
    )
    for name, method in METHODS.items():
        if method.samples is Method.samples:
            kind = {"pet.kind": method.only[0]} if method.only else {}
            assert not make_method(tiny_config("", method=name, **STATISTICS, **kind)).features_after


def test_what_cannot_be_is_one_clear_error():
    class Rehearsal(METHODS["sequential"]):
        samples = "pairs"

    with pytest.raises(ValueError, match='wants the pairs of earlier tasks as text.*"statistics" keeps none'):
        Rehearsal(pet=tiny_method().pet, statistics=2)
    with pytest.raises(ValueError, match="pool_answers: with source='statistics' prompts are pooled alone"):
        check_config(tiny_config("", **STATISTICS, **{"pseudo_samples.pool_answers": True}))
    with pytest.raises(ValueError, match="statistics_rank=0 must be positive"):
        check_config(tiny_config("", **(STATISTICS | {"pseudo_samples.statistics_rank": 0})))
    method, frozen, trainable = after_two_tasks()
    with pytest.raises(ValueError, match="which only a run that trained it has"):
        method.end_task(frozen, trainable, {"target": jnp.zeros(TASKS)}, at(2))


def test_growing_keeps_statistics():
    method, frozen, _ = after_two_tasks()
    grown = state.grow(frozen, method.frozen_leaves(parameters(MODEL), TASKS + 2))
    for name, array in frozen.memory["statistics"].items():
        np.testing.assert_array_equal(grown.memory["statistics"][name][:TASKS], array)
        assert grown.memory["statistics"][name].shape[0] == TASKS + 2


@pytest.mark.slow
def test_a_run_keeps_a_gaussian_a_task_and_goes_on_bit_for_bit(tmp_path):
    data = write_tasks(tmp_path / "data")
    config = tiny_config(data, **STATISTICS, **{"train.epochs": 1})
    continual.run(config, tmp_path / "whole")
    whole = committed(tmp_path / "whole")
    last = whole["02-first"]
    kept = {name: last[f"['memory']['statistics']['{name}']"] for name in ("mean", "factor", "diagonal")}
    assert kept["factor"].shape == (3, 32, 3)
    assert (np.abs(kept["mean"]).max(axis=1) > 0).all() and (kept["diagonal"].max(axis=1) > 0).all()
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    reflected = [record["reflection_by_task"] for record in records if record["kind"] == "train"]
    assert np.any(reflected[-1][:2]) and not np.any(reflected[0])
    # Only the first two tasks were ever learned; a longer order goes on from there.
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for folder in ("tasks/01-mirror", "tasks/02-first", "predictions/01-mirror", "predictions/02-first"):
        shutil.rmtree(tmp_path / "half" / folder)
    again = continual.run(config, tmp_path / "half")
    assert_same_arrays(committed(tmp_path / "half"), whole)
    stored = json.loads((tmp_path / "whole/scores.json").read_text())["attention_kl"]
    np.testing.assert_array_equal(again["attention_kl"], np.array(stored, np.float64))
    # With one slot there is nothing to move, and a task's own mean is nearest to its inputs.
    assert again["attention_kl"][0, 0] == 0 and (again["attention_kl"][np.tril_indices(3)] >= -1e-6).all()
    assert not list((tmp_path / "whole").glob("tasks/*/generated_data"))
