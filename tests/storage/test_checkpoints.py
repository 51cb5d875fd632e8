"""Checkpoints bit for bit, the errors of those that do not fit, and what a killed run may leave behind."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import state as states
from sapt_jax.models.families import Parameter
from sapt_jax.optimization import make_optimizer
from sapt_jax.pet import Lora
from sapt_jax.storage import checkpoints
from sapt_jax.storage.checkpoints import Loop, TaskCheckpoints
from sapt_jax.storage.costs import Costs
from tests.helpers.tiny import tiny_method

ATTENTION = "decoder/layers/self_attention"
PARAMETERS = {
    "token_embedder/embedding": Parameter((5, 6), ("vocab", "embed")),
    f"{ATTENTION}/query/kernel": Parameter((2, 6, 4), ("layers", "embed", "heads")),
    f"{ATTENTION}/value/kernel": Parameter((2, 6, 3), ("layers", "embed", "kv_heads")),
}
OPTIMIZER = make_optimizer("adamw", {}, 1e-3, (("selector/key", 10.0), (".*", 1.0)), 1.0)


def method_of(rank):
    return tiny_method(pet=Lora(rank, 8.0), query_hidden=3)


def fill(seed, tree):
    """Random values of every bit pattern that arithmetic gives, signed zeros and denormals included."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 1000, leaf.shape), leaf.dtype)
        values = rng.standard_normal(leaf.shape) * 10.0 ** rng.integers(-42, 30, leaf.shape)
        return jnp.asarray(np.where(rng.random(leaf.shape) < 0.1, -0.0, values), leaf.dtype)

    return jax.tree.map(draw, tree)


def make_trainable(seed, rank=2, dtype=jnp.float32):
    leaves = method_of(rank).trainable_leaves(PARAMETERS)
    return fill(seed, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), leaves, is_leaf=states.is_leaf))


def make_state(seed, **options):
    trainable = make_trainable(seed, **options)
    return fill(seed + 1, states.TrainState(trainable, OPTIMIZER.init(trainable), jnp.zeros((), jnp.int32)))


def make_frozen(seed, capacity=3, rank=2):
    frozen = states.start(jax.random.key(0), method_of(rank).frozen_leaves(PARAMETERS, capacity), None)
    return fill(seed, frozen.replace(enabled=None)).replace(
        base={"embedding": jnp.zeros((5, 6))}, enabled=jnp.ones((capacity,), bool)
    )


def assert_same_bits(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding, path
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


def save(folder, state, best, loop):
    saved = TaskCheckpoints(folder)
    saved.save(state, best, loop)
    saved.close()


def restore(folder, like):
    saved = TaskCheckpoints(folder)
    try:
        return saved.restore(like)
    finally:
        saved.close()


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path / "task", make_state(0)) is None
    assert checkpoints.latest_step(tmp_path / "task") == 0


@pytest.mark.parametrize("loop", [Loop(7), Loop(7, 4, 0.1 + 0.2, 2, True, ((16, 4), (32, 8)), Costs(1.5, 9, "device"))])
def test_a_task_in_training_comes_back_bit_for_bit(loop, tmp_path):
    state, best = make_state(1), make_trainable(3)
    save(tmp_path, state, best, loop)
    restored = restore(tmp_path, make_state(5))
    assert_same_bits(restored[0], state)
    assert_same_bits(restored[1], best)
    assert restored[2] == loop
    assert checkpoints.latest_step(tmp_path) == 7


@pytest.mark.slow
def test_the_latest_of_several_saves_wins(tmp_path):
    saved = TaskCheckpoints(tmp_path)
    for step in (5, 10, 100):
        saved.save(make_state(step), make_trainable(step), Loop(step))
    saved.close()
    state, best, loop = restore(tmp_path, make_state(0))
    assert_same_bits((state, best), (make_state(100), make_trainable(100)))
    assert loop == Loop(100) and checkpoints.latest_step(tmp_path) == 100


def test_what_is_saved_is_not_what_the_buffers_hold_later(tmp_path):
    """The next train step donates the state's buffers while the save still runs."""
    state, best = make_state(1), make_trainable(2)
    want = jax.tree.map(np.array, state)
    saved = TaskCheckpoints(tmp_path)
    saved.save(state, best, Loop(1))
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(state))
    saved.close()
    restored = restore(tmp_path, make_state(5))[0]
    assert_same_bits(restored, jax.tree.map(jnp.asarray, want))


@pytest.mark.slow
def test_a_save_that_was_cut_short_is_not_taken_for_one(tmp_path):
    save(tmp_path, make_state(1), make_trainable(1), Loop(5))
    # Orbax writes into such a folder and renames it at the end.
    (tmp_path / "steps" / "10.orbax-checkpoint-tmp" / "latest").mkdir(parents=True)
    (tmp_path / "steps" / "10.orbax-checkpoint-tmp" / "latest" / "part").write_bytes(b"half")
    assert checkpoints.latest_step(tmp_path) == 5
    assert restore(tmp_path, make_state(0))[2] == Loop(5)
    (tmp_path / "committed.orbax-checkpoint-tmp").mkdir()
    assert not checkpoints.has_committed(tmp_path)
    frozen, trainable = make_frozen(1), make_trainable(2)
    checkpoints.save_committed(tmp_path, frozen, trainable)
    assert checkpoints.has_committed(tmp_path)


def test_a_task_in_training_that_does_not_fit_names_every_array(tmp_path):
    save(tmp_path, make_state(1), make_trainable(1), Loop(5))
    with pytest.raises(ValueError) as error:
        restore(tmp_path, make_state(1, rank=3))
    message = str(error.value)
    assert str(tmp_path / "steps" / "5" / "latest") in message and "new --workdir" in message
    for projection in ("query", "value"):
        slot = f".slot['decoder']['layers']['self_attention']['{projection}']"
        assert f".trainable{slot}['a']: the checkpoint has float32[2, 6, 2], this run float32[2, 6, 3]" in message
        # The optimizer's two moments as well.
        assert sum(f"{slot}['b']: " in line and ".opt_state" in line for line in message.splitlines()) == 2


def test_a_committed_task_comes_back_bit_for_bit(tmp_path):
    frozen, trainable = make_frozen(1), make_trainable(2)
    checkpoints.save_committed(tmp_path, frozen, trainable)
    before = make_frozen(3)
    restored = checkpoints.load_committed(tmp_path, before, make_trainable(4))
    # The pretrained model and what the config switches off are not part of it.
    assert_same_bits(restored[0], frozen.replace(base=before.base, enabled=before.enabled))
    assert_same_bits(restored[1], trainable)
    assert checkpoints.saved_capacity(tmp_path, method_of(2).frozen_leaves(PARAMETERS, 1)) == 3


@pytest.mark.slow
def test_a_committed_task_that_does_not_fit_names_every_array(tmp_path):
    checkpoints.save_committed(tmp_path, make_frozen(1), make_trainable(2))
    smaller, wider = make_frozen(1, capacity=2), make_trainable(2, dtype=jnp.bfloat16)
    key = wider.selector["key"].astype(jnp.float32)
    wider = wider.replace(selector={"lock": key, "query_projection": wider.selector["query_projection"]})
    with pytest.raises(ValueError) as error:
        checkpoints.load_committed(tmp_path, smaller, wider)
    message = str(error.value)
    assert str(tmp_path / "committed") in message
    expected = {
        "missing: ['trainable'].selector['lock']",
        "unexpected: ['trainable'].selector['key']",
        "['memory']['keys']: the checkpoint has float32[3, 6], this run float32[2, 6]",
        "['memory']['reflection_targets']: the checkpoint has float32[3, 3], this run float32[2, 2]",
    }
    for projection, width in (("query", 4), ("value", 3)):
        site = f"['decoder']['layers']['self_attention']['{projection}']"
        for name, saved, ours in (
            ("a", [2, 6, 3, 2], [2, 6, 2, 2]),
            ("b", [2, 3, 2, width], [2, 2, 2, width]),
        ):
            expected.add(f"['bank']{site}['{name}']: the checkpoint has float32{saved}, this run float32{ours}")
        for name, shape in (("a", [2, 6, 2]), ("b", [2, 2, width])):
            dtypes = f"the checkpoint has float32{shape}, this run bfloat16{shape}"
            expected.add(f"['trainable'].slot{site}['{name}']: {dtypes}")
    for name, shape in (("['down']['kernel']", [6, 3]), ("['up']['kernel']", [3, 6])):
        dtypes = f"the checkpoint has float32{shape}, this run bfloat16{shape}"
        expected.add(f"['trainable'].selector['query_projection']{name}: {dtypes}")
    for name in ("scale", "bias"):
        dtypes = "the checkpoint has float32[6], this run bfloat16[6]"
        expected.add(f"['trainable'].selector['query_projection']['norm']['{name}']: {dtypes}")
    assert {line.strip() for line in message.splitlines()[1:]} == expected


def test_a_full_disk_is_one_message_and_leaves_what_was_saved(tmp_path, monkeypatch):
    save(tmp_path, make_state(1), make_trainable(1), Loop(5))
    full = shutil.disk_usage(tmp_path)._replace(free=2**16)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        for write in (
            lambda: save(tmp_path, make_state(2), make_trainable(2), Loop(6)),
            lambda: checkpoints.save_committed(tmp_path, make_frozen(1), make_trainable(2)),
        ):
            with pytest.raises(OSError, match="No space left on the disk. What was saved is whole") as error:
                write()
            assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert restore(tmp_path, make_state(0))[2] == Loop(5) and not checkpoints.has_committed(tmp_path)


# What a disk that was cut off may leave of a checkpoint: nothing in the place of these, or empty files.
DAMAGE = ("_METADATA", "manifest.ocdbt", "d", "ocdbt.process_0", "d and ocdbt.process_0", "empty _METADATA", "empty d")


def damage(folder, kind):
    emptied = kind.startswith("empty ")
    for name in kind.removeprefix("empty ").split(" and "):
        path = folder / name
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        if emptied:
            for file in files:
                file.write_bytes(b"")
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    checkpoints.save_committed(folder, make_frozen(1), make_trainable(2))
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_task_is_one_line_that_names_the_folder(whole, tmp_path, kind):
    shutil.copytree(whole, tmp_path / "task")
    damage(tmp_path / "task" / "committed", kind)
    leaves = method_of(2).frozen_leaves(PARAMETERS, 1)
    try:
        checkpoints.saved_capacity(tmp_path / "task", leaves)
        restored = checkpoints.load_committed(tmp_path / "task", make_frozen(3), make_trainable(4))
    except checkpoints.DamagedError as error:
        message = str(error)
        assert message.startswith(f"{tmp_path / 'task' / 'committed'} lacks a part")
        assert "delete this folder, and the same command learns" in message and "\n" not in message
    else:
        # What was merged from a process is no longer needed.
        assert kind == "ocdbt.process_0"
        assert_same_bits(restored[1], make_trainable(2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latest/d", "latest/_METADATA", "best/manifest.ocdbt", "loop", "empty loop"])
def test_a_damaged_step_gives_way_to_the_one_before(tmp_path, kind, caplog):
    for step in (5, 10):
        save(tmp_path, make_state(step), make_trainable(step), Loop(step))
    damage(tmp_path / "steps" / "10", kind)
    with caplog.at_level(logging.WARNING, logger="sapt_jax"):
        state, best, loop = restore(tmp_path, make_state(0))
    assert_same_bits((state, best), (make_state(5), make_trainable(5)))
    assert loop == Loop(5) and str(tmp_path / "steps" / "10") in caplog.text
    # The step is taken anew.
    save(tmp_path, make_state(10), make_trainable(10), Loop(10))
    assert restore(tmp_path, make_state(0))[2] == Loop(10)
    damage(tmp_path / "steps" / "10", kind)
    damage(tmp_path / "steps" / "5", kind)
    assert restore(tmp_path, make_state(0)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["[lr=0.01] a", "a*b?", "back\\slash", "a{b,c}"])
def test_a_path_is_no_pattern(tmp_path, name):
    folder = tmp_path / name / "tasks" / "00-[x]"
    save(folder, make_state(1), make_trainable(1), Loop(3))
    checkpoints.save_committed(folder, make_frozen(1), make_trainable(2))
    assert checkpoints.latest_step(folder) == 3 and checkpoints.has_committed(folder)
    assert_same_bits(restore(folder, make_state(5))[0], make_state(1))
    restored = checkpoints.load_committed(folder, make_frozen(3), make_trainable(4))
    assert_same_bits(restored[1], make_trainable(2))
