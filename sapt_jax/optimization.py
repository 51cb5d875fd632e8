"""An optimizer of optax, or the released code's, by its name; rates by expressions over leaf paths; the schedule."""

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sapt_jax.settings import FINITE, NOT_NEGATIVE, POSITIVE, Range, shown

SCHEDULES = ("constant", "linear", "cosine")

# (regular expression over leaf paths, factor on the learning rate); None instead of a factor trains nothing.
Rates = Sequence[tuple[str, float | None]]


def leaf_path(path: tuple) -> str:
    """The path of a leaf of a tree as rates name it: slot/decoder/layers/mlp/wo/a, selector/key."""
    return "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)


def make_optimizer(
    name: str, options: Mapping[str, Any], learning_rate: float, rates: Rates, max_grad_norm: float
) -> optax.GradientTransformation:
    """An optimizer at peak learning rates, under clipping by the global norm.

    The schedule is not part of it: tasks differ in their number of steps and share one compiled step, which scales the
    updates by `schedule_factor`.

    Args:
      name: "hf_adamw", or a function of optax that takes a learning rate, such as "adamw" or "adafactor".
      options: its other arguments, by their names there.
      rates: the first whose expression matches a leaf's whole path says its factor; every leaf needs one.

    Raises:
      ValueError: an unknown optimizer or option, or an expression or factor that cannot be. `init` raises it where a
        leaf is covered by no rule.
    """
    make = _find(name, options)
    factors = {_label(number): factor for number, (_, factor) in enumerate(rates)}
    groups = {
        label: optax.set_to_zero() if factor is None else make(learning_rate * factor)
        for label, factor in factors.items()
    }
    # What is not trained is no part of the norm either.
    kept = {label: optax.set_to_zero() if factor is None else optax.identity() for label, factor in factors.items()}

    def label_of(tree: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        labels = {leaf_path(path): _first_match(rates, leaf_path(path)) for path, _ in leaves}
        if uncovered := [path for path, label in labels.items() if label is None]:
            raise ValueError(
                f"config.optimizer.rates has no rule for {', '.join(uncovered)}: add a pair whose regular expression "
                "matches, such as ('.*', 1.0) at the end."
            )
        return jax.tree.unflatten(treedef, list(labels.values()))

    trained = [optax.multi_transform(kept, label_of)] if None in factors.values() else []
    clipped = optax.clip_by_global_norm(max_grad_norm)
    return optax.chain(*trained, clipped, optax.multi_transform(groups, label_of))


def check_rates(rates: Rates) -> None:
    """Checks the form of rates.

    Raises:
      ValueError: names every entry that is no pair of a regular expression and a factor that is not negative, or None.
    """
    problems = []
    for rate in rates:
        try:
            pattern, factor = rate
            re.compile(pattern)
            if factor is not None and factor not in NOT_NEGATIVE:
                raise ValueError
        except (TypeError, ValueError, re.error):
            problems.append(repr(rate))
    if problems or not rates:
        raise ValueError(
            f"config.optimizer.rates={shown(rates)}: {', '.join(problems) or 'nothing'} cannot be. An entry is a pair "
            "of a regular expression over leaf paths and a factor on the learning rate, or None for leaves that are "
            "not trained."
        )


def check_options(name: str, options: Sequence[tuple[str, Any]]) -> None:
    """Checks an optimizer's options by their form and range, and by making it.

    Raises:
      ValueError: names every entry that is no pair of a name and a value, or a number out of range; or the optimizer
        has no such options, or cannot use their values.
    """
    given = f"config.optimizer.options={shown(options)}"
    pairs = [entry for entry in options if isinstance(entry, list | tuple) and len(entry) == 2]
    pairs = [entry for entry in pairs if isinstance(entry[0], str)]
    if problems := [shown(entry) for entry in options if entry not in pairs]:
        raise ValueError(
            f"{given}: {', '.join(problems)} cannot be. An entry is a pair of a name and a value, as in "
            "--config.optimizer.options=\"(('weight_decay', 0.1),)\"."
        )
    for option, value in pairs:
        within = _OPTION_RANGES.get(option, FINITE)
        if isinstance(value, int | float) and value not in within:
            raise ValueError(f"{given}: {option} must be {within}.")
    # The rate is checked as a setting of its own.
    optimizer = make_optimizer(name, dict(pairs), 1e-3, ((".*", 1.0),), 1.0)
    try:
        tree = {"x": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        jax.eval_shape(lambda tree: optimizer.update(tree, optimizer.init(tree), tree), tree)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{given}: config.optimizer.name={name!r} cannot use them ({error}).") from None


def hf_adamw(
    learning_rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW as transformers 4.30 has it: epsilon is added to the root of the second moment before its correction.

    In the first updates it so counts 1 / sqrt(1 - b2 ** t) times as much as in optax.adamw. Weights decay after the
    update, by learning_rate * weight_decay.
    """

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any) -> tuple[Any, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        # 1 - b ** t, in float32 without the cancellation that costs five digits of b2's.
        first, second = (-jnp.expm1(count * math.log(decay)) for decay in (b1, b2))
        rate = learning_rate * jnp.sqrt(second) / first
        updates = jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + eps), mu, nu)
        if weight_decay:
            decay = learning_rate * weight_decay
            updates = jax.tree.map(lambda update, weight: update - decay * (weight + update), updates, params)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


# Of what optax's optimizers call so; of another number they say themselves what they take.
_OPTION_RANGES = {
    **dict.fromkeys(("b1", "b2", "b3", "decay", "decay_rate", "momentum", "beta"), Range(0, 1, below=True)),
    **dict.fromkeys(("eps", "epsilon"), POSITIVE),
    **dict.fromkeys(("eps_root", "weight_decay", "initial_accumulator_value"), NOT_NEGATIVE),
}

# By name, beside those of optax.
_OWN = {"hf_adamw": hf_adamw}


def _find(name: str, options: Mapping[str, Any]) -> Any:
    function = _OWN.get(name) or getattr(optax, name, None)
    known = inspect.signature(function).parameters if callable(function) else {}
    if "learning_rate" not in known:
        raise ValueError(
            f"config.optimizer.name={name!r} is no optimizer of optax: choose one, such as adamw or sgd, "
            f"or {', '.join(_OWN)}."
        )
    others = [option for option in known if option != "learning_rate"]
    if unknown := sorted(set(options) - set(others)):
        raise ValueError(
            f"config.optimizer.options: {name} takes no {', '.join(unknown)}; it takes {', '.join(others)}. "
            '--config.optimizer.options="()" leaves all at their defaults.'
        )
    return lambda rate: function(learning_rate=rate, **options)


def _label(number: int) -> str:
    return f"rule {number}"


def _first_match(rates: Rates, path: str) -> str | None:
    return next((_label(n) for n, (pattern, _) in enumerate(rates) if re.fullmatch(pattern, path)), None)


def schedule_factor(schedule: str, step: Any, warmup_steps: int, total_steps: Any) -> jax.Array:
    """The share [] of the peak learning rate at `step`: after warm-up "constant", or "linear" or "cosine" to zero.

    `step` (0-based) and `total_steps` may be traced.

    Raises:
      ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"config.optimizer.schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    done = jnp.clip((step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1), 0.0, 1.0)
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done))}[schedule]
    return decay * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
