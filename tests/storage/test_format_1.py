"""Workdirs from before methods owned their state: SAPT's arrays were fields of the two trees, for every method."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("transformers", reason="base models are written by transformers")

from sapt_jax import state  # noqa: E402
from sapt_jax.convert.__main__ import main  # noqa: E402
from sapt_jax.export.learned import declared_state, read_run  # noqa: E402
from sapt_jax.models.families import read_shape  # noqa: E402
from sapt_jax.storage import (
    checkpoints,  # noqa: E402, task_folders
    task_folders,
)
from sapt_jax.storage.checkpoints import TaskCheckpoints  # noqa: E402
from tests.helpers.learned_runs import TASKS, make_base, make_config  # noqa: E402
from tests.helpers.run_files import committed  # noqa: E402

# Sizes of the tests' T5, and of its blocks.
LAYERS, WIDTH, INNER, RANK, HIDDEN, PROMPT = 2, 16, 32, 2, 5, 3
ATTENTIONS = (("encoder", "attention"), ("decoder", "self_attention"), ("decoder", "encoder_decoder_attention"))
SETTINGS = {
    "seed": 42,
    "benchmark": "own",
    "task_order": ",".join(TASKS),
    "pet.rank": RANK,
    "pet.alpha": 6.0,
    "pet.prompt_length": PROMPT,
    "attention.query_hidden": HIDDEN,
    "attention.temperature": 0.5,
    "kl_ratio": 0.7,
    "pseudo_samples.batch_size": 3,
    "pseudo_samples.generator.steps": 11,
    "optimizer.learning_rate": 0.01,
    "optimizer.key_learning_rate": 0.001,
    "optimizer.query_projection_learning_rate": None,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.epsilon": 1e-8,
    "optimizer.weight_decay": 0.0,
}


def sites(kind):
    """(The part of an array's name that bank and slot share, its shape in a slot, the place of the task axis)."""
    if kind == "prompt":
        return [("['prompt']", (PROMPT, WIDTH), 0)]
    return [
        (f"['{stack}']['{attention}']['{projection}']['{leaf}']", shape, axis)
        for stack, attention in ATTENTIONS
        for projection in ("query", "value")
        for leaf, shape, axis in (("a", (LAYERS, WIDTH, RANK), 2), ("b", (LAYERS, RANK, INNER), 1))
    ]


def old_arrays(kind, capacity, seed):
    shapes = {
        "['keys']": (capacity, WIDTH),
        "['targets']": (capacity, capacity),
        "['trainable'].key": (WIDTH,),
        "['trainable'].query_projection['down']": (WIDTH, HIDDEN),
        "['trainable'].query_projection['up']": (HIDDEN, WIDTH),
        "['trainable'].query_projection['scale']": (WIDTH,),
        "['trainable'].query_projection['bias']": (WIDTH,),
    }
    for site, shape, axis in sites(kind):
        shapes[f"['bank']{site}"] = (*shape[:axis], capacity, *shape[axis:])
        shapes[f"['trainable'].slot{site}"] = shape
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    attention = np.tril(rng.random((capacity, capacity)) + 0.1)
    return arrays | {"['targets']": (attention / attention.sum(axis=1, keepdims=True)).astype(np.float32)}


def write_old(workdir, method, kind):
    """An old workdir of a run that has ended; returns what each task's checkpoint holds."""
    make_base("t5", workdir.parent / "base")
    workdir.mkdir()
    own = {"method": method, "pet.kind": kind, "model.path": str(workdir.parent / "base"), "model.variant": ""}
    (workdir / "config.json").write_text(json.dumps(SETTINGS | own))
    written = []
    with ocp.StandardCheckpointer() as checkpointer:
        for index, task in enumerate(TASKS):
            written.append(old_arrays(kind, 1 if method == "seq_lora" else len(TASKS), index))
            arrays = {name: jnp.asarray(array) for name, array in written[-1].items()}
            checkpointer.save(workdir / "tasks" / f"{index:02d}-{task}" / "committed", arrays)
    return written


def assert_is(frozen, trainable, old, kind, method):
    """Today's trees hold the old arrays, and nothing else."""

    def at(tree, path):
        for key in path.strip("[]'").split("']['"):
            tree = tree[key]
        return tree

    for site, _, _ in sites(kind):
        now = site.replace("coder']", "coder']['layers']")
        np.testing.assert_array_equal(at(frozen.bank, now), old[f"['bank']{site}"])
        np.testing.assert_array_equal(at(trainable.slot, now), old[f"['trainable'].slot{site}"])
    assert len(jax.tree.leaves(frozen.bank)) == len(jax.tree.leaves(trainable.slot)) == len(sites(kind))
    if method == "seq_lora":
        assert frozen.memory == trainable.selector == {}
        return
    np.testing.assert_array_equal(frozen.memory["keys"], old["['keys']"])
    np.testing.assert_array_equal(frozen.memory["reflection_targets"], old["['targets']"])
    np.testing.assert_array_equal(trainable.selector["key"], old["['trainable'].key"])
    projection = trainable.selector["query_projection"]
    for name, array in (
        ("down", projection["down"]["kernel"]),
        ("up", projection["up"]["kernel"]),
        ("scale", projection["norm"]["scale"]),
        ("bias", projection["norm"]["bias"]),
    ):
        np.testing.assert_array_equal(array, old[f"['trainable'].query_projection['{name}']"])
    assert len(frozen.memory) == len(trainable.selector) == 2


def declared(tmp_path, method, kind, capacity):
    """Today's leaves for such a workdir."""
    name = {"seq_lora": "sequential"}.get(method, method)
    config = make_config(tmp_path / "base", kind, **{"method": name, "sapt.query_hidden": HIDDEN})
    return declared_state(config, read_shape(config.model.path, ""), capacity)


def zeros(leaves):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.abstract(leaves))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("sapt", "lora"), ("sapt", "prompt"), ("seq_lora", "lora")])
def test_it_loads_into_the_trees_of_today(tmp_path, method, kind):
    written = write_old(tmp_path / "run", method, kind)
    leaves, _ = declared(tmp_path, method, kind, 1)
    for index, (task, old) in enumerate(zip(TASKS, written, strict=True)):
        folder = task_folders.task_folder(tmp_path / "run", index, task)
        capacity = checkpoints.saved_capacity(folder, leaves)
        assert capacity == (1 if method == "seq_lora" else len(TASKS))
        frozen, trainable = checkpoints.load_committed(folder, *zeros(declared(tmp_path, method, kind, capacity)))
        assert_is(frozen, trainable, old, kind, method)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("sapt", "lora"), ("sapt", "prompt"), ("seq_lora", "lora")])
def test_the_run_is_read(tmp_path, method, kind):
    written = write_old(tmp_path / "run", method, kind)
    learned = read_run(tmp_path / "run")
    assert learned.tasks == TASKS and learned.config.method == {"seq_lora": "sequential"}.get(method, method)
    for old, trainable in zip(written, learned.trainables, strict=True):
        frozen_then = {name: array for name, array in written[-1].items() if not name.startswith("['trainable']")}
        assert_is(learned.frozen, trainable, old | frozen_then, kind, method)
    config = learned.config
    assert (config.sapt.query_hidden, config.sapt.temperature, config.sapt.kl_ratio) == (HIDDEN, 0.5, 0.7)
    assert (config.sapt.reflection_batch, config.pseudo_samples.writer.steps) == (3, 11)
    assert config.optimizer.rates == (("selector/key", pytest.approx(0.1)), (".*", 1.0))
    assert config.optimizer.options == (("b2", 0.95), ("weight_decay", 0.0))


@pytest.mark.slow
def test_the_commands_read_it(tmp_path):
    """What goes to PyTorch and back is a workdir of today."""
    written = write_old(tmp_path / "run", "sapt", "lora")
    main(["to-torch", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'torch'}"])
    main(["from-torch", f"--model={tmp_path / 'torch'}", f"--out={tmp_path / 'back'}"])
    found = committed(tmp_path / "back")
    assert len(found) == len(TASKS)
    last = found[f"{len(TASKS) - 1:02d}-{TASKS[-1]}"]
    assert "['format']" in last and "['keys']" not in last
    np.testing.assert_array_equal(last["['memory']['keys']"], written[-1]["['keys']"])
    for site, _, _ in sites("lora"):
        name = f"['bank']{site}".replace("coder']", "coder']['layers']")
        np.testing.assert_array_equal(last[name], written[-1][f"['bank']{site}"])


@pytest.mark.slow
def test_what_does_not_fit_is_named_as_it_is_stored(tmp_path):
    write_old(tmp_path / "run", "sapt", "lora")
    folder = task_folders.task_folder(tmp_path / "run", 0, TASKS[0])
    with pytest.raises(ValueError, match=r"\['keys'\]: the checkpoint has float32\[3, 16\], this run float32\[2, 16\]"):
        checkpoints.load_committed(folder, *zeros(declared(tmp_path, "sapt", "lora", 2)))
    # A run of prompts finds no prompt, and blocks that it cannot use.
    with pytest.raises(ValueError, match=r"lacks \['bank'\]\['prompt'\]"):
        checkpoints.saved_capacity(folder, declared(tmp_path, "sapt", "prompt", 1)[0])
    with pytest.raises(ValueError, match=r"unexpected: \['bank'\]\['decoder'\]\['self_attention'\]\['query'\]\['a'\]"):
        checkpoints.load_committed(folder, *zeros(declared(tmp_path, "sapt", "prompt", 3)))


@pytest.mark.parametrize("method", ["sapt", "seq_lora"])
def test_a_task_in_the_middle_says_what_to_delete(tmp_path, method):
    make_base("t5", tmp_path / "base")
    folder = tmp_path / "run" / "tasks" / "00-first"
    old = old_arrays("lora", 1, 0)
    trainable = {
        name.removeprefix("['trainable']"): jnp.asarray(array)
        for name, array in old.items()
        if name.startswith("['trainable']")
    }
    latest = {f".trainable{name}": array for name, array in trainable.items()} | {".step": jnp.zeros((), jnp.int32)}
    with ocp.CheckpointManager(folder / "steps", item_names=("latest", "best", "loop")) as manager:
        manager.save(
            4,
            args=ocp.args.Composite(
                latest=ocp.args.StandardSave(latest),
                best=ocp.args.StandardSave(trainable),
                loop=ocp.args.JsonSave({"step": 4}),
            ),
        )
    fresh = zeros(declared(tmp_path, method, "lora", 1)[1])
    like = state.TrainState(fresh, optax.sgd(1.0).init(fresh), jnp.zeros((), jnp.int32))
    saved = TaskCheckpoints(folder)
    with pytest.raises(ValueError, match=f"older version of sapt_jax.*delete {folder / 'steps'}, and the task starts"):
        saved.restore(like)
    saved.close()


def test_a_format_of_the_future_is_told(tmp_path):
    where = tmp_path / "committed"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(where, {"['format']": jnp.asarray(checkpoints.FORMAT + 1, jnp.int32), "['x']": jnp.ones(2)})
    make_base("t5", tmp_path / "base")
    with pytest.raises(ValueError, match=f"in format {checkpoints.FORMAT + 1}.*take a newer one"):
        checkpoints.load_committed(tmp_path, *zeros(declared(tmp_path, "sapt", "lora", 1)))
