"""The optimizer against PyTorch's AdamW, group by group, and the schedule's factors against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapt_jax.optimization import check_rates, hf_adamw, make_optimizer, schedule_factor
from sapt_jax.state import Trainable

RATES = ((r"slot/.*", 1.0), (r"selector/key", 5.0), (r"selector/query_projection/.*", 0.3))
OPTIONS = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
PEAK, MAX_GRAD_NORM = 0.01, 1.5


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    projection = {"down": {"kernel": leaf(5, 2)}, "up": {"kernel": leaf(2, 5)}}
    return Trainable(
        slot={"query": {"a": leaf(2, 3), "b": leaf(3, 4)}},
        selector={"key": leaf(5), "query_projection": projection},
    )


def flat(tree):
    return {
        "slot": jax.tree.leaves(tree.slot),
        "key": [tree.selector["key"]],
        "query_projection": jax.tree.leaves(tree.selector["query_projection"]),
    }


def adamw(rates=RATES):
    return make_optimizer("adamw", OPTIONS, PEAK, rates, MAX_GRAD_NORM)


def step(optimizer, tree, state, grads, factor=1.0):
    updates, state = optimizer.update(grads, state, tree)
    return optax.apply_updates(tree, jax.tree.map(lambda update: factor * update, updates)), state


@pytest.mark.slow
@pytest.mark.parametrize("rates", [RATES, ((".*", 1.0),)])
def test_equals_torch_adamw_with_groups_clipping_and_schedule(rates):
    """Gradients of very different size: clipping is by one norm over all groups, and only where it is exceeded."""
    torch = pytest.importorskip("torch", reason="the reference is PyTorch's AdamW")
    optimizer = adamw(rates)
    tree = draw(0)
    state = optimizer.init(tree)
    factors = [factor for _, factor in rates] if len(rates) == 3 else [1.0] * 3
    peaks = dict(zip(("slot", "key", "query_projection"), [PEAK * factor for factor in factors], strict=True))
    parameters = {name: [torch.tensor(np.asarray(x)) for x in leaves] for name, leaves in flat(tree).items()}
    torch_adamw = torch.optim.AdamW(
        [{"params": parameters[name], "lr": peak} for name, peak in peaks.items()],
        betas=(OPTIONS["b1"], OPTIONS["b2"]),
        eps=OPTIONS["eps"],
        weight_decay=OPTIONS["weight_decay"],
    )
    everything = [x for leaves in parameters.values() for x in leaves]
    norms = []
    for index, scale in enumerate([1.0, 0.05, 30.0, 1e-3]):
        grads, factor = draw(index + 1, scale), (index + 1) / 4
        tree, state = step(optimizer, tree, state, grads, factor)
        for name, leaves in flat(grads).items():
            for parameter, grad in zip(parameters[name], leaves, strict=True):
                parameter.grad = torch.tensor(np.asarray(grad))
        norms.append(float(torch.nn.utils.clip_grad_norm_(everything, MAX_GRAD_NORM)))
        for group, peak in zip(torch_adamw.param_groups, peaks.values(), strict=True):
            group["lr"] = factor * peak
        torch_adamw.step()
    assert min(norms) < MAX_GRAD_NORM < max(norms)
    for name, leaves in flat(tree).items():
        for ours, theirs in zip(leaves, parameters[name], strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_hf_adamw_adds_epsilon_before_the_bias_correction(weight_decay):
    """Against the algorithm of transformers 4.30 in float64, at an epsilon as large as the gradients."""
    b1, b2, eps, rate = 0.9, 0.999, 1e-2, 0.01
    optimizer = hf_adamw(rate, b1, b2, eps, weight_decay)
    tree = draw(0)
    state, plain = optimizer.init(tree), optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    first, second = ([np.zeros_like(x) for x in leaves] for _ in range(2))
    for number in range(1, 8):
        grads = draw(number, scale=1e-2)
        if number == 1:
            other = optax.apply_updates(tree, plain.update(grads, plain.init(tree), tree)[0])
        tree, state = step(optimizer, tree, state, grads)
        for place, grad in enumerate(np.asarray(x, np.float64) for x in jax.tree.leaves(grads)):
            first[place] = b1 * first[place] + (1 - b1) * grad
            second[place] = b2 * second[place] + (1 - b2) * grad**2
            size = rate * math.sqrt(1 - b2**number) / (1 - b1**number)
            leaves[place] = leaves[place] - size * first[place] / (np.sqrt(second[place]) + eps)
            leaves[place] = leaves[place] - rate * weight_decay * leaves[place]
        for ours, theirs in zip(jax.tree.leaves(tree), leaves, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        if number == 1:
            # It is another optimizer than optax's.
            assert max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(other), leaves, strict=True)) > 1e-3


def changed_parts(rates, seed=1):
    optimizer, tree = adamw(rates), draw(0)
    new, _ = step(optimizer, tree, optimizer.init(tree), draw(seed))
    before, after = flat(tree), flat(new)
    return {name for name in before if any((a != b).any() for a, b in zip(before[name], after[name], strict=True))}


def test_a_rate_of_zero_or_none_leaves_its_leaves_as_they_are():
    for factor in (0.0, None):
        rates = ((r"selector/query_projection/.*", factor), (".*", 1.0))
        assert changed_parts(rates) == {"slot", "key"}


@pytest.mark.slow
def test_the_first_rule_that_matches_a_whole_path_counts():
    assert changed_parts(((r"selector/.*", None), (r"selector/key", 1.0), (".*", 1.0))) == {"slot"}
    assert changed_parts(((r"selector", None), (".*", 1.0))) == {"slot", "key", "query_projection"}


def test_leaves_that_are_not_trained_are_no_part_of_the_norm():
    rates = ((r"selector/.*", None), (".*", 1.0))
    optimizer = make_optimizer("sgd", {}, 1.0, rates, MAX_GRAD_NORM)
    tree, grads = draw(0), draw(1)
    shrink = min(1, MAX_GRAD_NORM / float(optax.tree.norm(grads.slot)))
    huge = grads.replace(selector=jax.tree.map(lambda x: 1e6 * x, grads.selector))
    for own in (grads, huge):
        new, _ = step(optimizer, tree, optimizer.init(tree), own)
        expected = jax.tree.map(lambda x, g: x - g * shrink, tree.slot, grads.slot)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), new.slot, expected)


def test_a_leaf_that_no_rule_covers_is_an_error():
    optimizer = adamw(((r"slot/.*", 1.0), (r"selector/key", 1.0)))
    with pytest.raises(ValueError, match="has no rule for selector/query_projection/down/kernel, selector/query_proj"):
        optimizer.init(draw(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adafactor", "lion", "adam"])
def test_any_optimizer_of_optax_by_its_name(name):
    optimizer, tree = make_optimizer(name, {}, 0.1, ((".*", 1.0),), 1e9), draw(0)
    new, _ = step(optimizer, tree, optimizer.init(tree), draw(1))
    plain = getattr(optax, name)(learning_rate=0.1)
    updates, _ = plain.update(draw(1), plain.init(tree), tree)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), new, optax.apply_updates(tree, updates))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "config.optimizer.name='adamv' is no optimizer of optax"),
        ("apply_updates", {}, "is no optimizer of optax"),
        ("sgd", {"b1": 0.9}, "config.optimizer.options: sgd takes no b1; it takes momentum"),
        ("adamw", {"learning_rate": 0.1}, "config.optimizer.options: adamw takes no learning_rate"),
    ],
)
def test_an_unknown_optimizer_or_option_is_an_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, options, 0.1, ((".*", 1.0),), 1.0)


def test_rates_that_cannot_be_are_all_named():
    check_rates(RATES)
    wrong = ((".*",), ("(", 1.0), (".*", -1.0), 3)
    with pytest.raises(ValueError, match="config.optimizer.rates=") as error:
        check_rates((*RATES, *wrong))
    _, _, told = str(error.value).partition(": ")
    assert all(repr(rate) in told for rate in wrong)
    assert repr(RATES[0]) not in told
    with pytest.raises(ValueError, match=r"config.optimizer.rates=\(\): nothing cannot be"):
        check_rates(())


def written_out(schedule, step, warmup, total):
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
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
