import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.methods.reflection import reflection_loss


def reflect(targets, weights, valid, task_index):
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))
    return reflection_loss(jnp.asarray(targets, jnp.float32), log_weights, jnp.asarray(valid), task_index)


@pytest.mark.slow
def test_reflection_equals_a_loop():
    rng = np.random.default_rng(1)
    tasks, size, task_index = 4, 3, 2
    targets = np.zeros((tasks, tasks))
    for i in range(tasks):
        targets[i, : i + 1] = rng.dirichlet(np.ones(i + 1))
    weights = np.zeros((tasks, size, tasks))
    weights[..., : task_index + 1] = rng.dirichlet(np.ones(task_index + 1), (tasks, size))
    valid = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]], bool)
    total, by_task = reflect(targets, weights, valid, task_index)
    for i in range(tasks):
        kls = [
            sum(g * np.log(g / a) for g, a in zip(targets[i], weights[i, n], strict=True) if g > 0)
            for n in range(size)
            if valid[i, n] and i < task_index
        ]
        np.testing.assert_allclose(by_task[i], np.mean(kls or [0.0]), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(total, by_task.sum(), rtol=1e-6)


def test_reflection_is_zero_where_nothing_moved():
    targets = np.array([[1.0, 0, 0], [0.3, 0.7, 0], [0, 0, 0]])
    weights = np.repeat(targets[:, None], 2, axis=1)
    weights[2] = 1 / 3
    total, _ = reflect(targets, weights, np.ones((3, 2), bool), 2)
    np.testing.assert_allclose(total, 0.0, atol=1e-7)


@pytest.mark.slow
def test_reflection_with_a_one_hot_target_is_minus_log_weight():
    targets = np.array([[0.0, 1.0], [0.0, 0.0]])
    weights = np.array([[[0.8, 0.2]], [[0.5, 0.5]]])
    total, _ = reflect(targets, weights, np.ones((2, 1), bool), 1)
    np.testing.assert_allclose(total, -np.log(0.2), rtol=1e-6)


def test_an_empty_pool_adds_nothing():
    targets, weights = np.eye(2), np.full((2, 1, 2), 0.5)
    total, _ = reflect(targets, weights, np.zeros((2, 1), bool), 1)
    assert total == 0
