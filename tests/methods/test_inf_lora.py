"""InfLoRA against the release's loop in float64, and what must stay as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.methods.inf_lora import InfLora
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.models.layers import input_of
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pet.lora import sites
from tests.helpers import gated_reference as reference
from tests.helpers.learned_runs import Ours, assert_exports_answer, make_base, make_rows
from tests.helpers.run_files import assert_same_arrays, committed
from tests.helpers.stopped import run_stopped_once
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at, empty_frozen, fresh, noise

METHOD = InfLora(Lora(2, 8.0))
MODELS = {name: make_model(VARIANTS[name], "float32", "none") for name in ("llama-tiny", "t5-tiny")}
MODEL = MODELS["llama-tiny"]
QUERY = ("decoder", "layers", "self_attention")


def after_a_task(seed, model=MODEL):
    """The frozen tree after one task whose inputs spanned five directions at every site."""
    base = {"token_embedder": {"embedding": jnp.ones((9, model.config.d_model))}}
    frozen = empty_frozen(METHOD, model, base, 3)
    rng = np.random.default_rng(seed)

    def projector(x):
        basis = np.linalg.qr(rng.normal(size=(*x.shape[:2], 5)))[0]
        return jnp.asarray(basis @ basis.swapaxes(1, 2), jnp.float32)

    return frozen.replace(memory={"spans": jax.tree.map(projector, frozen.memory["spans"]), "tasks": jnp.ones(())})


def at_path(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_task_starts_off_the_span_with_columns_of_a_fresh_block_s_norm(name):
    frozen = after_a_task(2, MODELS[name])
    block = fresh(METHOD, MODELS[name], frozen.base, 3, frozen=frozen, task=at(1)).slot
    for site, own in sites(block).items():
        # What lay in the span comes out of A as zero, whatever B is.
        span = at_path(frozen.memory["spans"], input_of(site))
        np.testing.assert_allclose(np.einsum("KDE,KER->KDR", span, own["a"]), 0.0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(own["a"], axis=1), 3**-0.5, rtol=1e-5)
        assert not np.any(own["b"])
    for own in sites(fresh(METHOD, MODELS[name], frozen.base, 3).slot).values():
        norms = np.linalg.norm(own["a"], axis=1)
        assert np.abs(own["a"]).max() <= own["a"].shape[1] ** -0.5 and norms.max() > 1.01 * norms.min()


def test_a_span_of_everything_leaves_a_block_nothing_to_read():
    frozen = after_a_task(3)
    whole = jax.tree.map(lambda x: jnp.broadcast_to(jnp.eye(x.shape[1]), x.shape), frozen.memory["spans"])
    frozen = frozen.replace(memory={**frozen.memory, "spans": whole})
    block = fresh(METHOD, MODEL, frozen.base, 3, frozen=frozen, task=at(1)).slot
    assert not any(np.any(x) for x in jax.tree.leaves(block))


def test_a_does_not_move_under_an_update():
    frozen = after_a_task(4)
    trainable = fresh(METHOD, MODEL, frozen.base, 5, frozen=frozen, task=at(1))
    moved = trainable.replace(slot=jax.tree.map(lambda x: x + 1.0, trainable.slot))
    kept = METHOD.project(frozen, trainable, moved, at(1)).slot
    for site, block in sites(kept).items():
        np.testing.assert_array_equal(block["a"], sites(trainable.slot)[site]["a"])
        np.testing.assert_array_equal(block["b"], sites(moved.slot)[site]["b"])


def toy(start, threshold, rank=2):
    """(Ours, what is written out, the batches of three tasks)."""
    base = reference.make_base(0)
    ours = reference.Ours(InfLora(Lora(rank, 8.0), threshold=threshold, start=start), base, 3)
    kinds = {"gated": False, "fixed": True, "from_inputs": start == "inputs", "threshold": threshold}
    return ours, reference.Written(base, rank, 8.0 / rank, **kinds), [reference.batches_of(10 + t) for t in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["drawn", "inputs"])
def test_five_steps_before_and_after_a_boundary_equal_the_algorithm_written_out(start):
    ours, written, tasks = toy(start, threshold=0.98)
    for number, batches in enumerate(tasks):
        block = at_path(ours.begin(batches).slot, (*QUERY, "query"))
        written.begin(ours.drawn(), batches)
        reference.assert_same_products(block, written.blocks[number], by="a")
        ours.fit(batches)
        written.fit(batches)
        trained = at_path(ours.trainable.slot, (*QUERY, "query"))
        np.testing.assert_array_equal(trained["a"], block["a"])
        reference.assert_same_products(trained, written.blocks[number])
        ours.end(batches)
        written.end(batches)
        spans = np.array(at_path(ours.frozen.memory["spans"], (*QUERY, "states")), np.float64)
        for span, basis in zip(spans, written.bases, strict=True):
            np.testing.assert_allclose(span, basis @ basis.T, atol=1e-5)
            np.testing.assert_allclose(span @ span, span, atol=1e-6)
            np.testing.assert_allclose(np.trace(span), basis.shape[1], atol=1e-5)
    counts = [basis.shape[1] for basis in written.bases]
    assert all(1 < count <= reference.WIDTH for count in counts)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["drawn", "inputs"])
def test_an_answer_in_the_span_is_what_it_was_before_a_later_task(start):
    """With spans of all that was read, so that what is cut off plays no part."""
    ours, written, (first, second, _) = toy(start, threshold=0.98)

    def answers(batches, task):
        weights = ours.method.weights(ours.frozen, ours.trainable, jnp.zeros((6, 1)), at(task), training=False)
        mixture = ours.method.mixture(ours.frozen, ours.trainable, weights, at(task))
        given = [[batch[name] for name in ("source", "source_mask", "target", "target_mask")] for batch in batches]
        return [np.array(reference.apply(ours.frozen.base, *one, mixture))[one[3]] for one in given]

    ours.begin(first)
    written.begin(ours.drawn(), first)
    ours.fit(first)
    written.fit(first)
    ours.end(first)
    inputs = [moment.numpy() for moment in written.moments(first)[0]]
    whole = jnp.asarray(np.stack([x @ np.linalg.pinv(x, rcond=1e-10, hermitian=True) for x in inputs]), jnp.float32)
    assert np.trace(whole[0]) < reference.WIDTH - 1
    spans = jax.tree.map(lambda x: whole, ours.frozen.memory["spans"])
    ours.frozen = ours.frozen.replace(memory={**ours.frozen.memory, "spans": spans})
    bank, before, others = ours.frozen.bank, answers(first, 0), answers(second, 0)
    ours.begin(second)
    for _ in range(4):
        ours.fit(second)
    np.testing.assert_allclose(np.concatenate(answers(first, 1)), np.concatenate(before), atol=2e-5)
    assert np.abs(np.concatenate(answers(second, 1)) - np.concatenate(others)).max() > 1e-3
    ours.end(second)
    for path, old in sites(bank).items():
        np.testing.assert_array_equal(sites(ours.frozen.bank)[path]["a"][:, :, 0], old["a"][:, :, 0])
        np.testing.assert_array_equal(sites(ours.frozen.bank)[path]["b"][:, 0], old["b"][:, 0])


@pytest.mark.slow
def test_a_has_no_part_in_the_gradient():
    ours, _, (batches, _, _) = toy("drawn", threshold=0.98)
    ours.begin(batches)
    trainable = ours.trainable.replace(slot=noise(1, ours.trainable.slot))

    def loss(trainable):
        return ours.method.task_loss(reference.apply, None, ours.frozen, trainable, batches[0], at(0))[0]

    block = at_path(jax.grad(loss)(trainable).slot, (*QUERY, "query"))
    assert not np.any(block["a"]) and np.any(block["b"])


def test_blocks_other_than_lora_are_refused():
    with pytest.raises(ValueError, match="config.method='inf_lora' .* set config.pet.kind='lora'"):
        InfLora(Prompt(3))


@pytest.mark.slow
def test_a_whole_run_whose_blocks_go_out_as_a_plain_sum(tmp_path, monkeypatch):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    make_base("llama of bytes", tmp_path / "base")
    overrides = {"method": "inf_lora", "inf_lora.start": "inputs", "inf_lora.threshold": 0.9, "train.epochs": 1}
    overrides |= {"task_order": "shout,mirror", "model.path": str(tmp_path / "base"), "model.variant": ""}
    config = tiny_config(data_dir, **overrides)
    scores = continual.run(config, tmp_path / "run")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    first, last = committed(tmp_path / "run").values()
    span = first["['memory']['spans']['decoder']['layers']['self_attention']['states']"]
    site = "['bank']['decoder']['layers']['self_attention']['query']"
    a, b = last[f"{site}['a']"], last[f"{site}['b']"]
    np.testing.assert_allclose(np.einsum("KDE,KER->KDR", span, a[:, :, 1]), 0.0, atol=1e-5)
    np.testing.assert_array_equal(first[f"{site}['a']"][:, :, 0], a[:, :, 0])
    np.testing.assert_array_equal(first[f"{site}['b']"][:, 0], b[:, 0])
    assert np.any(b[:, 1]) and last["['memory']['tasks']"] == 2
    again = run_stopped_once(config, tmp_path / "stopped", monkeypatch)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert_same_arrays(committed(tmp_path / "stopped"), committed(tmp_path / "run"))

    ours, batch = Ours(tmp_path / "run"), make_rows("llama of bytes", seed=3)
    np.testing.assert_array_equal(ours.attention(batch), np.ones((len(batch["source"]), 2)))
    real, wanted = batch["target_mask"], ours.logits(batch, np.ones(2, np.float32))
    assert np.abs(ours.logits(batch, np.zeros(2, np.float32)) - wanted)[real].max() > 1e-2
    assert_exports_answer(ours.learned, None, batch, wanted, tmp_path)
