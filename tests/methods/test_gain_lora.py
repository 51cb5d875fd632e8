"""GainLoRA against its algorithm written out in float64, and gates that stay shut on earlier inputs."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import continual, state
from sapt_jax.export.to_hf import write_merged
from sapt_jax.export.to_torch import write_model
from sapt_jax.methods.gain_lora import GainLora, opening, read_by
from sapt_jax.models.layers import input_of
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pet.lora import sites
from tests.helpers import gated_reference as reference
from tests.helpers.learned_runs import Ours, assert_exports_answer, make_base, make_rows
from tests.helpers.run_files import assert_same_arrays, committed, times_compiled
from tests.helpers.stopped import run_stopped_once
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at, noise

RANK, HIDDEN = 2, 7
QUERY = ("decoder", "layers", "self_attention", "query")


def make_method(over="inf_lora", **fields):
    return GainLora(Lora(RANK, 8.0), over=over, hidden=HIDDEN, **fields)


def block_of(trainable):
    block = trainable.slot
    for name in QUERY:
        block = block[name]
    return block


def toy(over, tasks=3, **fields):
    """(Ours, what is written out, the batches of three tasks)."""
    base, fixed = reference.make_base(0), over == "inf_lora"
    ours = reference.Ours(make_method(over, **fields), base, tasks)
    lambda1 = 0.0 if fixed else fields.pop("lambda1", 0.5)
    written = reference.Written(base, RANK, 8.0 / RANK, True, fixed, fixed, lambda1, **fields)
    return ours, written, [reference.batches_of(10 + t) for t in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over", "fields"),
    [("inf_lora", {}), ("inf_lora", {"rescale": False}), ("o_lora", {"lambda1": 0.3})],
    ids=["released", "without rescaling", "reconstructed"],
)
def test_five_steps_before_and_after_a_boundary_equal_the_algorithm_written_out(over, fields):
    ours, written, tasks = toy(over, threshold=0.98, gate_threshold=0.9, **fields)
    for number, batches in enumerate(tasks):
        ours.begin(batches)
        written.begin(ours.drawn(), batches)
        reference.assert_same_products(block_of(ours.trainable), written.blocks[number], by="a")
        metrics = ours.fit(batches)
        written.fit(batches)
        reference.assert_same_products(block_of(ours.trainable), written.blocks[number])
        gate, other = ours.trainable.selector, written.gates[number]
        # The sign of a key is that of a singular vector, and plays no part.
        sign = np.sign(np.vdot(gate["key"], other["key"].numpy()))
        np.testing.assert_allclose(sign * gate["key"], other["key"].numpy(), atol=1e-5)
        for name in ("down", "up"):
            np.testing.assert_allclose(gate[name], other[name].numpy(), atol=1e-5)
        batch = batches[0]
        pooled = [written.pooled(batch, row) for row in range(5)]
        weights = ours.method.weights(ours.frozen, ours.trainable, np.array(pooled, np.float32), at(number), False)
        np.testing.assert_allclose(weights[:, : number + 1], [written.openings(p) for p in pooled], atol=1e-5)
        assert not np.any(weights[:, number + 1 :])
        assert ("overlap" in metrics) == (over == "o_lora")
        ours.end(batches)
        written.end(batches)
        assert ("spans" in ours.frozen.memory) == (over == "inf_lora")
        for name, span in ours.frozen.memory["gate_spans"].items():
            basis = written.gate_bases[name].numpy()
            np.testing.assert_allclose(span, basis @ basis.T, atol=1e-5)
            np.testing.assert_allclose(span @ span, span, atol=1e-6)
    # What later tasks did is not in the slots before.
    for task, gate in enumerate(written.gates):
        np.testing.assert_allclose(ours.frozen.memory["gates"]["up"][task], gate["up"].numpy(), atol=1e-5)


def shut_gate(seed, method):
    """(Frozen after a task, a trainable at the start of the next, pooled inputs that the task spanned), all random."""
    leaves, rng = method.trainable_leaves(reference.PARAMETERS), np.random.default_rng(seed)
    frozen = state.empty(method.frozen_leaves(reference.PARAMETERS, 2))
    trainable = state.start(jax.random.key(seed), leaves, None)
    # Few enough that each array of the gate reads some that it did not before.
    inputs = jnp.asarray(rng.normal(size=(3, reference.WIDTH)), jnp.float32)
    found = read_by(trainable.selector, inputs)
    spans = jax.tree.map(lambda x: jnp.linalg.pinv(x) @ x, found)
    key = trainable.selector["key"]
    trainable = trainable.replace(selector={**trainable.selector, "key": key - spans["key"] @ key})
    memory = {**frozen.memory, "gate_spans": spans, "tasks": jnp.ones(())}
    frozen = frozen.replace(base=reference.make_base(seed), enabled=jnp.ones((2,), bool), memory=memory)
    return frozen, trainable, inputs


@pytest.mark.slow
@pytest.mark.parametrize("over", ["inf_lora", "o_lora"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_gate_stays_at_its_start_on_the_span_through_fifty_steps(over, rescale):
    ours = reference.Ours(make_method(over, rescale=rescale), reference.make_base(5), 2)
    ours.frozen, ours.trainable, inputs = shut_gate(5, ours.method)
    ours.trainable = ours.trainable.replace(slot=noise(6, ours.trainable.slot))
    ours.index, start = 1, ours.trainable
    others = jnp.asarray(np.random.default_rng(7).normal(size=(3, reference.WIDTH)), jnp.float32)
    before = {name: np.array(opening(start.selector, x)) for name, x in (("old", inputs), ("new", others))}
    np.testing.assert_allclose(before["old"], 0.0, atol=1e-6)
    ours.fit(reference.batches_of(8, number=50))
    after = ours.trainable.selector
    assert np.abs(opening(after, others) - before["new"]).max() > 1e-3
    read = (read_by(gate, inputs) for gate in (start.selector, after))
    drift = max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, read), strict=True))
    if rescale:
        # The release scales the columns that earlier inputs read, too.
        assert drift > 1e-4
    else:
        assert drift < 1e-5
        np.testing.assert_allclose(opening(after, inputs), 0.0, atol=1e-5)


@pytest.mark.slow
def test_gates_of_slots_that_are_empty_or_withdrawn_are_shut():
    ours, _, (first, second, _) = toy("inf_lora")
    for batches in (first, second):
        ours.begin(batches)
        ours.fit(batches)
        ours.end(batches)
    features = jnp.asarray(np.random.default_rng(1).normal(size=(4, reference.WIDTH)), jnp.float32)
    weights = ours.method.weights(ours.frozen, ours.trainable, features, at(1), False)
    assert (weights[:, :2] > 0).all() and (weights[:, :2] <= np.tanh(2)).all() and not np.any(weights[:, 2])
    withdrawn = ours.frozen.replace(enabled=jnp.asarray([False, True, True]))
    without = ours.method.weights(withdrawn, ours.trainable, features, at(1), False)
    np.testing.assert_array_equal(without, weights.at[:, 0].set(0.0))
    none = ours.method.weights(ours.frozen, ours.trainable, 0 * features, at(1), False)
    assert not np.any(none)


@pytest.mark.slow
def test_a_bank_that_grew_answers_as_before_and_takes_another_task():
    ours, _, tasks = toy("inf_lora")
    grown, _, _ = toy("inf_lora", tasks=2)
    for run in (ours, grown):
        for batches in tasks[:2]:
            run.begin(batches)
            run.fit(batches)
            run.end(batches)
    base = grown.frozen.base
    grown.frozen = state.grow(grown.frozen, grown.method.frozen_leaves(reference.PARAMETERS, 3)).replace(base=base)
    before = sites(grown.frozen.bank)[QUERY]
    for run in (ours, grown):
        run.begin(tasks[2])
        run.fit(tasks[2])
        run.end(tasks[2])
    for name in ("bank", "memory"):
        jax.tree.map(np.testing.assert_array_equal, getattr(grown.frozen, name), getattr(ours.frozen, name))
    # Blocks of earlier tasks are bit for bit what they were.
    after = sites(grown.frozen.bank)[QUERY]
    np.testing.assert_array_equal(after["a"][:, :, :2], before["a"][:, :, :2])
    np.testing.assert_array_equal(after["b"][:, :2], before["b"][:, :2])


def test_blocks_other_than_lora_are_refused():
    with pytest.raises(ValueError, match="config.method='gain_lora' .* set config.pet.kind='lora'"):
        GainLora(Prompt(3))


@pytest.mark.slow
def test_a_stopped_run_on_a_tiny_t5_goes_on_grows_and_compiles_once(tmp_path, monkeypatch, caplog):
    data_dir = write_tasks(tmp_path / "data")
    overrides = {"method": "gain_lora", "model.variant": "t5-tiny", "train.epochs": 1, "task_order": "shout,mirror"}
    config = tiny_config(data_dir, **overrides, **{"gain_lora.hidden": 6, "gain_lora.threshold": 0.9})
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        scores = continual.run(config, tmp_path / "whole")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    # Both passes of both tasks share one program.
    for function in ("step", "generate", "measure", "end_task"):
        assert times_compiled(caplog, function) == 1, function
    again = run_stopped_once(config, tmp_path / "stopped", monkeypatch)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    whole = committed(tmp_path / "whole")
    assert_same_arrays(committed(tmp_path / "stopped"), whole)

    config.task_order = "shout,mirror,first"
    grown = continual.run(config, tmp_path / "whole")
    assert np.isfinite(np.array(grown["matrix"])[np.tril_indices(3)]).all()
    np.testing.assert_array_equal(np.array(grown["matrix"])[:2, :2], scores["matrix"])
    first, second, third = committed(tmp_path / "whole").values()
    blocks = [name for name in first if name.startswith("['bank']") and name.endswith("['a']")]
    assert len(blocks) == 6
    for name in blocks:
        np.testing.assert_array_equal(third[name][:, :, 0], first[name][:, :, 0])
        np.testing.assert_array_equal(third[name][:, :, 1], second[name][:, :, 1])
        # A of a task lies off what the projection read before, whatever it reads.
        *module, site = name.removesuffix("['a']").removeprefix("['bank']").strip("[]'").split("']['")
        span = second["".join(f"['{part}']" for part in ("memory", "spans", *input_of((*module, site))))]
        np.testing.assert_allclose(np.einsum("KDE,KER->KDR", span, third[name][:, :, 2]), 0.0, atol=1e-5)
    gates = "['memory']['gates']['key']"
    np.testing.assert_array_equal(third[gates][:2], second[gates])


@pytest.mark.slow
def test_a_reconstructed_run_whose_blocks_go_out_under_given_weights(tmp_path):
    data_dir = write_tasks(tmp_path / "data", tasks=("shout", "mirror"))
    make_base("llama of bytes", tmp_path / "base")
    overrides = {"method": "gain_lora", "gain_lora.over": "o_lora", "gain_lora.hidden": 6, "train.epochs": 1}
    overrides |= {"task_order": "shout,mirror", "model.path": str(tmp_path / "base"), "model.variant": ""}
    scores = continual.run(tiny_config(data_dir, **overrides), tmp_path / "run")
    assert np.isfinite(np.array(scores["matrix"])[np.tril_indices(2)]).all()
    assert scores["protocol"]["gain_lora.over"] == "o_lora"
    ours, batch = Ours(tmp_path / "run"), make_rows("llama of bytes", seed=3)
    with pytest.raises(ValueError, match="anew for each input: give --weights"):
        write_merged(ours.learned, None, tmp_path / "merged")
    weights = np.array([0.9, 0.6], np.float32)
    wanted = ours.logits(batch, weights)
    assert_exports_answer(ours.learned, weights, batch, wanted, tmp_path)
    with pytest.raises(ValueError, match="to-peft and to-hf"):
        write_model(ours.learned, True, tmp_path / "torch")
