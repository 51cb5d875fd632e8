"""The optimizer against PyTorch's AdamW, group by group, and the schedule's factors against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapt_jax.optimization import SCHEDULES, make_optimizer, schedule_factor
from sapt_jax.state import Trainable

SETTINGS = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.5}


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    slot = {"query": {"a": leaf(2, 3), "b": leaf(3, 4)}}
    return Trainable(slot=slot, key=leaf(5), query_projection={"down": leaf(5, 2), "up": leaf(2, 5)})


def flat(tree):
    return {
        "slot": jax.tree.leaves(tree.slot),
        "key": [tree.key],
        "query_projection": jax.tree.leaves(tree.query_projection),
    }


def step(optimizer, tree, state, grads, factor=1.0):
    updates, state = optimizer.update(grads, state, tree)
    return optax.apply_updates(tree, jax.tree.map(lambda update: factor * update, updates)), state


@pytest.mark.parametrize("rates", [(0.01, 0.003, 0.05), (0.01, None, None)])
def test_equals_torch_adamw_with_groups_clipping_and_schedule(rates):
    """Gradients of very different size: clipping is by one norm over all groups, and only where it is exceeded."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's AdamW")
    block, projection, key = rates
    optimizer = make_optimizer(block, projection, key, **SETTINGS)
    tree = draw(0)
    state = optimizer.init(tree)
    peaks = {"slot": block, "key": key or block, "query_projection": projection or block}
    parameters = {name: [torch.tensor(np.asarray(x)) for x in leaves] for name, leaves in flat(tree).items()}
    adamw = torch.optim.AdamW(
        [{"params": parameters[name], "lr": peak} for name, peak in peaks.items()],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["epsilon"],
        weight_decay=SETTINGS["weight_decay"],
    )
    everything = [x for leaves in parameters.values() for x in leaves]
    norms = []
    for index, scale in enumerate([1.0, 0.05, 30.0, 1e-3]):
        grads, factor = draw(index + 1, scale), (index + 1) / 4
        tree, state = step(optimizer, tree, state, grads, factor)
        for name, leaves in flat(grads).items():
            for parameter, grad in zip(parameters[name], leaves, strict=True):
                parameter.grad = torch.tensor(np.asarray(grad))
        norms.append(float(torch.nn.utils.clip_grad_norm_(everything, SETTINGS["max_grad_norm"])))
        for group, peak in zip(adamw.param_groups, peaks.values(), strict=True):
            group["lr"] = factor * peak
        adamw.step()
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms)
    for name, leaves in flat(tree).items():
        for ours, theirs in zip(leaves, parameters[name], strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=2e-6)


def test_a_rate_of_zero_leaves_its_group_as_it_is():
    optimizer = make_optimizer(0.01, 0.0, 0.02, **SETTINGS)
    tree = draw(0)
    new, _ = step(optimizer, tree, optimizer.init(tree), draw(1))
    before, after = flat(tree), flat(new)
    assert all((a == b).all() for a, b in zip(before["query_projection"], after["query_projection"], strict=True))
    for name in ("slot", "key"):
        assert all((a != b).all() for a, b in zip(before[name], after[name], strict=True))


def written_out(schedule, step, warmup, total):
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (4, 10), (10, 10), (20, 10)])
def test_schedule_factors(schedule, warmup, total):
    factor = jax.jit(lambda step, total: schedule_factor(schedule, step, warmup, total))
    got = [float(factor(jnp.int32(step), jnp.int32(total))) for step in range(total + 2)]
    np.testing.assert_allclose(
        got, [written_out(schedule, step, warmup, total) for step in range(total + 2)], atol=1e-6
    )
    assert min(got[:total]) > 0


def test_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="config.optimizer.schedule='step' is unknown; choose one of constant, linear"):
        schedule_factor("step", jnp.int32(0), 0, jnp.int32(1))
