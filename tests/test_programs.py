"""The train step against a written-out float64 reference in PyTorch: a loop over blocks, no factored mixture."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapt_jax import pet
from sapt_jax.config import default_config
from sapt_jax.methods.base import Samples
from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import LlamaConfig
from sapt_jax.optimization import make_optimizer
from sapt_jax.programs import make_apply, make_train_step
from sapt_jax.state import Trainable, TrainState
from tests.helpers.sapt_reference import Reference, base_model, to_torch
from tests.helpers.tiny import tiny_method
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

TASKS, RANK, ALPHA, KL_RATIO = 4, 3, 6.0, 0.7
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
CONFIG = LlamaConfig(50, 24, 2, 4, 2, 6, 40, 1e-6, 10000.0, (), 64, True)
SGD = optax.sgd(1.0)
MODEL = Llama(CONFIG, jnp.float32, "none")
LORA = pet.Lora(RANK, ALPHA)
PROMPT = pet.Prompt(length=4)
FIELDS = {"pet": LORA, "kl_ratio": KL_RATIO, "query_hidden": 7}
METHOD = tiny_method(**FIELDS)


def make_state(seed, method=METHOD, tasks=TASKS):
    """Random frozen and trainable trees: every block non-zero, so that every gradient path carries something."""
    base = init_base(MODEL, seed)
    trainable = fresh(method, MODEL, base, seed + 1)
    return random_frozen(method, MODEL, base, tasks, seed), trainable.replace(slot=noise(seed + 40, trainable.slot))


def make_batch(seed, rows=6, source=9, target=5):
    rng = np.random.default_rng(seed)
    source_mask = np.arange(source)[None] >= rng.integers(0, source - 2, (rows, 1))
    target_mask = np.arange(target)[None] < rng.integers(1, target + 1, (rows, 1))
    return {
        "source": np.where(source_mask, rng.integers(3, 50, (rows, source)), 0).astype(np.int32),
        "source_mask": source_mask,
        "target": np.where(target_mask, rng.integers(3, 50, (rows, target)), 0).astype(np.int32),
        "target_mask": target_mask,
    }


def make_samples(seed, tasks=TASKS):
    """One pseudo-sample for each task, so that what the step draws is known."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 0.5, (tasks, 1, CONFIG.d_model)).astype(np.float32)
    return Samples(jnp.asarray(features), jnp.ones((tasks,), jnp.int32))


@functools.cache
def compiled_step(method, accumulation, optimizer):
    config = default_config()
    config.train.accumulation = accumulation
    return jax.jit(make_train_step(config, make_apply(MODEL), method, optimizer), donate_argnums=1)


def run_step(method, frozen, trainable, batch, samples, task_index, accumulation=1, optimizer=None):
    """(trainable before minus after under SGD with rate 1, that is the gradient; metrics)."""
    optimizer = optimizer or SGD
    step = compiled_step(method, accumulation, optimizer)
    before = jax.tree.map(np.array, trainable)
    # The step donates what it is given.
    trainable = jax.tree.map(jnp.copy, trainable)
    state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
    state, metrics = step(frozen, state, batch, samples, at(task_index))
    return jax.tree.map(lambda x, y: x - np.array(y), before, state.trainable), metrics


def reference(method, frozen, trainable, batch, samples, task_index):
    """Loss, reflection loss, mean attention and gradients in float64."""
    slot, selector = jax.tree.map(lambda x: to_torch(x, requires_grad=True), (trainable.slot, trainable.selector))
    written = Reference("llama", base_model(HF_CONFIG, frozen.base), method, frozen, slot, selector, task_index)
    nll, tokens, attention = written.nll(batch)
    reflection = written.reflection(np.array(samples.features[:, 0]))
    loss = nll / tokens + KL_RATIO * reflection
    loss.backward()
    zero = lambda x: np.zeros(x.shape) if x.grad is None else x.grad.numpy()  # noqa: E731
    gradient = Trainable(jax.tree.map(zero, slot), jax.tree.map(zero, selector))
    attention = attention.detach().numpy() / len(batch["source"])
    return float(loss.detach()), float(reflection.detach()), attention, gradient


@pytest.mark.slow
@pytest.mark.parametrize("task_index", [0, 1, 3])
@pytest.mark.parametrize(
    "kind", [LORA, pet.Lora(RANK, ALPHA, stop_gradient_through_bank=True), PROMPT], ids=["lora", "lora-stop", "prompt"]
)
def test_step_equals_the_written_out_reference(task_index, kind):
    method = tiny_method(**{**FIELDS, "pet": kind})
    frozen, trainable = make_state(task_index, method)
    batch, samples = make_batch(10 + task_index), make_samples(20 + task_index)
    expected = reference(method, frozen, trainable, batch, samples, task_index)
    loss, reflection, attention, gradient = expected
    found, metrics = run_step(method, frozen, trainable, batch, samples, task_index)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["reflection_loss"], reflection, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["attention"][: task_index + 1], attention, atol=1e-6)
    assert not np.any(metrics["attention"][task_index + 1 :])
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(gradient), strict=True):
        scale = max(np.abs(theirs).max(), 1e-3)
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * scale + 3e-7, err_msg=jax.tree_util.keystr(path))


def test_first_task_is_plain_lora():
    frozen, trainable = make_state(5)
    gradient, metrics = run_step(METHOD, frozen, trainable, make_batch(6), make_samples(7), 0)
    assert metrics["attention"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not any(np.any(x) for x in jax.tree.leaves(gradient.selector))
    assert all(np.any(x) for x in jax.tree.leaves(gradient.slot))


@pytest.mark.slow
def test_only_the_trainable_tree_changes():
    frozen, trainable = make_state(8)
    before = jax.tree.map(np.array, frozen)
    optimizer = make_optimizer("adamw", {}, 1e-2, ((".*", 1.0),), 1.0)
    gradient, _ = run_step(METHOD, frozen, trainable, make_batch(9), make_samples(9), 2, optimizer=optimizer)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))
    assert all(np.any(x) for x in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_later_slots_do_not_matter():
    frozen, trainable = make_state(11)
    batch, samples = make_batch(12), make_samples(13)
    first, _ = run_step(METHOD, frozen, trainable, batch, samples, 1)
    scrambled = frozen.replace(
        bank=jax.tree_util.tree_map_with_path(
            lambda path, x: x.at[:, :, 2:].set(9.0) if path[-1].key == "a" else x.at[:, 2:].set(9.0), frozen.bank
        ),
        memory=jax.tree.map(lambda x: x.at[2:].set(9.0), frozen.memory),
    )
    second, _ = run_step(METHOD, scrambled, trainable, batch, samples, 1)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_is_one_batch(accumulation):
    frozen, trainable = make_state(14)
    batch, samples = make_batch(15), make_samples(16)
    whole, expected = run_step(METHOD, frozen, trainable, batch, samples, 2)
    parts, found = run_step(METHOD, frozen, trainable, batch, samples, 2, accumulation)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["attention"], expected["attention"], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), parts, whole)


def test_the_loss_may_be_a_mean_of_micro_batch_means():
    """Each micro-batch on its own, and their mean; one of filler rows alone is none."""
    frozen, trainable = make_state(29)
    batch, samples = make_batch(30), make_samples(31)
    config = default_config()
    config.train.accumulation, config.train.loss_mean = 3, "micro_batches"
    method = tiny_method(**{**FIELDS, "kl_ratio": 0.0})
    step = jax.jit(make_train_step(config, make_apply(MODEL), method, SGD))
    parts = [run_step(method, frozen, trainable, {k: v[m::3] for k, v in batch.items()}, samples, 2) for m in range(3)]
    whole, _ = run_step(method, frozen, trainable, batch, samples, 2)
    for kept in (3, 2):
        for name in ("source_mask", "target_mask"):
            batch[name] = batch[name] & (np.arange(6) % 3 < kept)[:, None]
        state, metrics = step(
            frozen, TrainState(trainable, SGD.init(trainable), jnp.zeros((), jnp.int32)), batch, samples, at(2)
        )
        found = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), trainable, state.trainable)
        expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *(gradient for gradient, _ in parts[:kept]))
        np.testing.assert_allclose(metrics["loss"], np.mean([own["loss"] for _, own in parts[:kept]]), rtol=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    assert not np.allclose(whole.selector["key"], expected.selector["key"], rtol=1e-3)


@pytest.mark.slow
def test_filler_rows_do_not_count():
    frozen, trainable = make_state(17)
    batch, samples = make_batch(18), make_samples(19)
    padded = {k: np.concatenate([v, np.zeros((2, v.shape[1]), v.dtype)]) for k, v in batch.items()}
    first, expected = run_step(METHOD, frozen, trainable, batch, samples, 2)
    second, found = run_step(METHOD, frozen, trainable, padded, samples, 2)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["attention"], expected["attention"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), second, first)


@pytest.mark.slow
def test_one_trace_for_five_tasks():
    chex.clear_trace_counter()
    method, tasks = tiny_method(**FIELDS), 5
    optimizer = make_optimizer("adamw", {}, 1e-2, (("selector/.*", 0.1), (".*", 1.0)), 1.0)
    config = default_config()
    step = make_train_step(config, make_apply(MODEL), method, optimizer)
    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=1)
    end_task = jax.jit(chex.assert_max_traces(method.end_task, n=1))
    frozen, trainable = make_state(21, tasks=tasks)
    for task in range(tasks):
        trainable = fresh(method, MODEL, frozen.base, task, previous=trainable)
        state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
        for number in range(2):
            batch = make_batch(task * 2 + number)
            state, _ = step(frozen, state, batch, make_samples(task, tasks), at(task, steps=10 + task))
        trainable = state.trainable
        frozen = end_task(frozen, trainable, {"target": frozen.memory["reflection_targets"][task]}, at(task))
    assert step._cache_size() == 1


@pytest.mark.slow
def test_a_hook_that_a_method_does_not_have_is_no_part_of_the_step():
    """Sequential LoRA has no penalty, no memory and no attention to learn; its block goes on."""
    method = tiny_method("sequential", pet=LORA)
    frozen, trainable = make_state(22, method, tasks=1)
    assert frozen.memory == {} and trainable.selector == {}
    _, metrics = run_step(method, frozen, trainable, make_batch(23), None, 0)
    assert metrics["attention"].tolist() == [1.0]
    assert metrics.keys() == {"loss", "task_loss", "attention", "grad_norm", "tokens"}
    again = fresh(method, MODEL, frozen.base, 0, previous=trainable)
    jax.tree.map(np.testing.assert_array_equal, again, trainable)


@pytest.mark.slow
def test_without_a_weight_the_reflection_loss_is_no_part_of_the_step():
    frozen, trainable = make_state(24)
    _, metrics = run_step(tiny_method(**{**FIELDS, "kl_ratio": 0.0}), frozen, trainable, make_batch(25), None, 2)
    assert "reflection_loss" not in metrics
    np.testing.assert_array_equal(metrics["loss"], metrics["task_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken):
    frozen, trainable = make_state(26)
    samples = make_samples(27)
    if broken == "loss":
        trainable = trainable.replace(slot=jax.tree.map(lambda x: x.at[0].set(jnp.inf), trainable.slot))
    else:
        # The loss does not see what is not finite, since these keys take no part; the gradient of a product does.
        samples = samples.replace(features=samples.features.at[0].set(jnp.inf))
    before = jax.tree.map(np.array, trainable)
    optimizer = make_optimizer("adamw", {}, 1e-2, ((".*", 1.0),), 1.0)
    state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
    opened = jax.tree.map(np.array, state.opt_state)
    state, metrics = compiled_step(METHOD, 1, optimizer)(frozen, state, make_batch(28), samples, at(2))
    assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    jax.tree.map(np.testing.assert_array_equal, state.trainable, before)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, opened)
    assert state.step == 1
