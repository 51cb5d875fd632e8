"""L2P's choice, mixture and loss against loops in float64, and what gradients reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.methods.l2p import L2p
from sapt_jax.methods.losses import token_cross_entropy
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Mixture, Prompt
from sapt_jax.programs import make_apply
from tests.helpers.run_files import committed
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at, empty_frozen, fresh, init_base, noise

LENGTH, SIZE, CHOSEN = 2, 6, 3
METHOD = L2p(Prompt(LENGTH), size=SIZE, chosen=CHOSEN, pull=0.7)
MODEL = make_model(VARIANTS["llama-tiny"], "float32", "none")
WIDTH = MODEL.config.d_model
BASE = {"token_embedder": {"embedding": jnp.ones((9, WIDTH))}}


def trees(seed, model=MODEL, base=BASE):
    trainable = fresh(METHOD, model, base, seed)
    return empty_frozen(METHOD, model, base, 1), trainable.replace(slot=noise(seed + 1, trainable.slot))


def queries(seed, rows=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, WIDTH)), jnp.float32)


def written_out(query, keys):
    """The places of the keys with the largest cosines, in the pool's order, and the sum of these cosines."""
    query, keys = np.array(query, np.float64), np.array(keys, np.float64)
    alike = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in keys]
    places = sorted(sorted(range(SIZE), key=lambda m: -alike[m])[:CHOSEN])
    return places, sum(alike[m] for m in places)


@pytest.mark.slow
def test_choice_and_input_equal_a_loop():
    frozen, trainable = trees(0)
    features = queries(1)
    weights = METHOD.weights(frozen, trainable, features, at(0), training=False)
    mixture = METHOD.mixture(frozen, trainable, weights, at(0))
    assert mixture.prompt.shape == (5, METHOD.prompt_length(1), WIDTH) == (5, CHOSEN * LENGTH, WIDTH)
    pool = np.array(trainable.slot["prompt"]).reshape(SIZE, LENGTH, WIDTH)
    seen = set()
    for row in range(5):
        places, _ = written_out(features[row], trainable.selector["keys"])
        assert np.flatnonzero(weights[row]).tolist() == places and weights[row].sum() == CHOSEN
        np.testing.assert_array_equal(mixture.prompt[row], np.concatenate(pool[places]))
        seen.add(tuple(places))
    assert len(seen) > 1


@pytest.mark.slow
def test_a_row_s_choice_does_not_depend_on_the_rows_beside_it():
    frozen, trainable = trees(2)
    features = queries(3, rows=8)
    together = METHOD.weights(frozen, trainable, features, at(0), training=False)
    for row in range(8):
        alone = METHOD.weights(frozen, trainable, features[row : row + 1], at(0), training=False)
        np.testing.assert_array_equal(alone[0], together[row])


def fake_apply(features):
    """A model whose last states are `features`, and whose logits depend on the prompt alone."""
    head = jnp.asarray(np.random.default_rng(4).normal(size=(WIDTH, 11)), jnp.float32)

    def apply(base, source, mask, *rest, method=None, rng=None):
        if method == "encode":
            return jnp.broadcast_to(features[:, None], (*source.shape, WIDTH))
        target, _, mixture = rest
        states = jnp.tanh(mixture.prompt).mean(axis=1)[:, None] * (1 + jnp.arange(target.shape[1]))[:, None]
        return states @ head

    return apply


def batch_of(seed, rows):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(3, 11, (rows, 4)), rng.integers(3, 11, (rows, 5))
    masks = {"source_mask": np.ones(source.shape, bool), "target_mask": np.arange(5) < rng.integers(1, 6, (rows, 1))}
    # The last row fills the batch up.
    masks = {name: np.where(np.arange(rows)[:, None] < rows - 1, mask, False) for name, mask in masks.items()}
    return {"source": source, "target": target, **masks}


@pytest.mark.slow
def test_the_loss_of_a_step_is_that_of_the_answers_less_the_mean_pull():
    frozen, trainable = trees(5)
    features, batch = queries(6, rows=4), batch_of(7, 4)
    apply = fake_apply(features)
    total, logs = METHOD.task_loss(apply, None, frozen, trainable, batch, at(0))
    weights = METHOD.weights(frozen, trainable, features, at(0), training=True)
    logits = apply(
        None, batch["source"], None, batch["target"], None, METHOD.mixture(frozen, trainable, weights, at(0))
    )
    nll, tokens = token_cross_entropy(logits, jnp.asarray(batch["target"]), jnp.asarray(batch["target_mask"]))
    pulls = [written_out(features[row], trainable.selector["keys"])[1] for row in range(3)]
    np.testing.assert_allclose(total / tokens, nll / tokens - 0.7 * np.mean(pulls), rtol=1e-5)
    np.testing.assert_allclose(logs["cosines"], np.sum(pulls), rtol=1e-5)
    assert np.isfinite(total)


@pytest.mark.slow
def test_gradients_reach_the_chosen_prompts_and_keys_alone():
    frozen, trainable = trees(8)
    features, batch = queries(9, rows=2), batch_of(10, 2)
    grads = jax.grad(
        lambda trainable: METHOD.task_loss(fake_apply(features), None, frozen, trainable, batch, at(0))[0]
    )(trainable)
    # One real row.
    places, _ = written_out(features[0], trainable.selector["keys"])
    others = [m for m in range(SIZE) if m not in places]
    of_keys = np.array(grads.selector["keys"])
    assert np.abs(of_keys[places]).min(axis=1).all() and not np.any(of_keys[others])
    assert len(others) == SIZE - CHOSEN
    tokens = batch["target_mask"].sum()
    query, keys = np.array(features[0], np.float64), np.array(trainable.selector["keys"], np.float64)
    for place in places:
        key, size = keys[place], np.linalg.norm(keys[place])
        unit = query / np.linalg.norm(query)
        slope = unit / size - (unit @ key) * key / size**3
        np.testing.assert_allclose(of_keys[place], -0.7 * tokens * slope, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_prompts_that_no_row_chose_get_no_gradient():
    frozen, trainable = trees(11)
    features, batch = jnp.broadcast_to(queries(12, rows=1), (3, WIDTH)), batch_of(13, 3)
    grads = jax.grad(
        lambda trainable: METHOD.task_loss(fake_apply(features), None, frozen, trainable, batch, at(0))[0]
    )(trainable)
    places, _ = written_out(features[0], trainable.selector["keys"])
    touched = np.abs(np.array(grads.slot["prompt"]).reshape(SIZE, -1)).max(axis=1) > 0
    assert np.flatnonzero(touched).tolist() == places


def test_pool_and_keys_go_on_from_task_to_task():
    _, first = trees(14)
    keys = np.array(first.selector["keys"])
    assert keys.shape == (SIZE, WIDTH) and -1 <= keys.min() < -0.9 and 0.9 < keys.max() <= 1
    second = fresh(METHOD, MODEL, BASE, 15, previous=first, task=at(1, slot=0))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert METHOD.capacity(15) == 1 and METHOD.slot_index(7) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tiny", "t5-tiny"])
def test_the_query_is_of_the_bare_model_and_the_input_begins_with_the_chosen_prompts(name):
    model = make_model(VARIANTS[name], "float32", "none")
    base = init_base(model)
    apply = make_apply(model)
    frozen, trainable = trees(16, model, base)
    rng = np.random.default_rng(17)
    ids = {name: rng.integers(3, 90, (2, 4)).astype(np.int32) for name in ("source", "target")}
    batch = {**ids, **{f"{name}_mask": np.ones((2, 4), bool) for name in ids}}
    total, _ = jax.jit(lambda trainable: METHOD.task_loss(apply, None, frozen, trainable, batch, at(0)))(trainable)
    states = np.array(apply(base, batch["source"], batch["source_mask"], method="encode"), np.float64)
    chosen = [written_out(states[row].mean(axis=0), trainable.selector["keys"]) for row in range(2)]
    pool = np.array(trainable.slot["prompt"]).reshape(SIZE, LENGTH, -1)
    prompt = jnp.asarray(np.stack([np.concatenate(pool[places]) for places, _ in chosen]))
    logits = apply(
        base, *(batch[n] for n in ("source", "source_mask", "target", "target_mask")), Mixture(prompt=prompt)
    )
    nll, tokens = token_cross_entropy(logits, batch["target"], batch["target_mask"])
    np.testing.assert_allclose(total, nll - 0.7 * tokens * np.mean([pull for _, pull in chosen]), rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="config.method='l2p' .* set config.pet.kind='prompt'"):
        L2p(Lora(2, 8.0))
    with pytest.raises(ValueError, match="config.l2p.chosen=5 of a pool of config.l2p.size=4"):
        L2p(Prompt(2), size=4, chosen=5)


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    overrides = {"method": "l2p", "pet.kind": "prompt", "pet.prompt_length": LENGTH, "train.epochs": 1}
    overrides |= {"l2p.size": SIZE, "l2p.chosen": CHOSEN, "task_order": "shout,mirror"}
    scores = continual.run(tiny_config(write_tasks(tmp_path / "data"), **overrides), tmp_path / "run")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    assert scores["protocol"]["needs_task_id"] is False
    assert all((source + CHOSEN * LENGTH) % 16 == 0 for source, _ in scores["buckets"])
    first, last = committed(tmp_path / "run").values()
    assert first["['bank']['prompt']"].shape == (1, SIZE * LENGTH, 32)
    assert np.any(first["['bank']['prompt']"] != last["['bank']['prompt']"])
