"""Two tiny tasks on one device and on meshes of eight, for tests/test_eight_devices.py.

JAX fixes the number of devices when it starts, so this runs as a program of its own:

    python -m tests.helpers.on_eight_devices FOLDER llama-tiny

writes FOLDER/results.npz, shardings.txt and CASE.hlo, and with a last argument "all" for every mesh with every PET.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sapt_jax import sharding
from sapt_jax.decoding.search import make_generate, read_source
from sapt_jax.methods.base import Pools
from sapt_jax.models.families import VARIANTS, init_params, make_model
from sapt_jax.optimization import make_optimizer
from sapt_jax.pet import Lora, Prompt
from sapt_jax.programs import TaskScalars, init_state, make_train_step
from sapt_jax.run import make_method
from sapt_jax.state import Trainable, commit, init_frozen
from sapt_jax.storage import checkpoints
from sapt_jax.tools.compile_check.programs import shape_of
from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny import tiny_method

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
# Sizes that occur nowhere else, so that a shape in the HLO tells what it is.
TASKS, RANK, PROMPT, ROWS, SOURCE, TARGET, NEW_TOKENS = 3, 5, 6, 8, 11, 7, 4
PETS = {"lora": Lora(RANK, 10.0, stop_gradient_through_bank=False), "prompt": Prompt(PROMPT)}
# Every mesh with each family and with each PET, and LoRA on the mixed one in both: compilation is what takes the time.
COVER = {
    "t5-tiny": {"lora": ("mixed", "tensor"), "prompt": ("data", "fsdp")},
    "llama-tiny": {"lora": ("mixed", "fsdp"), "prompt": ("data", "tensor", "mixed")},
}
# T5 has biases of each head, which eight devices have to divide.
SHAPES = {"t5-tiny": {"num_heads": 8, "head_dim": 8}, "llama-tiny": {}}
STEPS = 2
NAMED_CONFIGS = sorted(
    path.stem
    for path in (REPOSITORY / "configs").glob("*.py")
    if path.stem.startswith(("t5_", "llama", "smollm2", "demo"))
)


@contextlib.contextmanager
def mesh_of(*sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        yield mesh


def noise(seed, tree, scale=0.1):
    """Random values in a tree's shapes: every block non-zero, so that every path of the gradient carries something.

    With larger ones T5's attention, which does not scale its logits, saturates: float32 would not settle its gradient.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), tree)


def make_batch(seed, vocab):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, SOURCE + 1, (ROWS, 1)), rng.integers(1, TARGET + 1, (ROWS, 1))
    # No padding inside: both families read it, whatever side they pad.
    masks = np.arange(SOURCE)[None] >= SOURCE - lengths[0], np.arange(TARGET)[None] < lengths[1]
    ids = [np.where(mask, rng.integers(3, vocab, mask.shape), 0).astype(np.int32) for mask in masks]
    return {"source": ids[0], "source_mask": masks[0], "target": ids[1], "target_mask": masks[1]}


def model_of(variant):
    shape = dataclasses.replace(VARIANTS[variant], tie_embeddings=False, **SHAPES[variant])
    return make_model(shape, "float32", "none")


@functools.cache
def params_of(variant):
    """Random weights on the host."""
    with mesh_of(1, 1, 1) as mesh:
        abstract = sharding.abstract_params(model_of(variant), mesh, jnp.float32)
        return jax.device_get(init_params(model_of(variant), abstract, 0))


class Case:
    """A model with a PET on a mesh, its arrays and its jitted functions."""

    def __init__(self, variant, pet, mesh):
        self.mesh = mesh
        self.model = model_of(variant)
        shape = self.model.config
        self.method = tiny_method(pet=PETS[pet])
        abstract = sharding.abstract_params(self.model, mesh, jnp.float32)
        self.base = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params_of(variant), abstract)
        sites = self.model.pet_sites(shape)
        frozen = sharding.create(lambda: init_frozen(None, self.method.pet, sites, shape.d_model, TASKS), mesh)
        targets = np.tril(np.random.default_rng(1).random((TASKS, TASKS)).astype(np.float32) + 0.1)
        values = frozen.replace(
            bank=noise(2, frozen.bank),
            keys=noise(3, frozen.keys),
            targets=targets / targets.sum(axis=1, keepdims=True),
        )
        self.frozen = sharding.place(values, mesh).replace(base=self.base)
        table = jax.ShapeDtypeStruct((shape.vocab_size, shape.d_model), jnp.float32)
        self.fresh = jax.eval_shape(
            lambda rng, table: self.method.open_task(rng, sites, table, None), jax.random.key(0), table
        )
        # Its state is the gradient after the first step; Adam would divide rounding by rounding.
        optimizer = optax.sgd(0.01, momentum=0.9)
        placed = lambda function, *of: sharding.shardings(jax.eval_shape(function, *of), mesh)  # noqa: E731
        self.open_state = jax.jit(
            lambda trainable: init_state(optimizer, trainable),
            out_shardings=placed(lambda trainable: init_state(optimizer, trainable), self.fresh),
        )
        rest = frozen.replace(base=None)
        self.commit = jax.jit(commit, out_shardings=placed(lambda: rest))
        pooled = noise(4, jax.ShapeDtypeStruct((TASKS, 2, shape.d_model), jnp.float32), 0.5)
        self.pools = sharding.place(Pools(pooled, np.full((TASKS,), 2, np.int32)), mesh)
        state = jax.eval_shape(self.open_state, self.fresh)
        step = make_train_step(
            self.model,
            self.method,
            optimizer,
            lambda step, total: 1.0,
            1,
            0,
            (sharding.shardings(state, mesh), sharding.replicated(mesh)),
        )
        arguments = (self.frozen, self.start(0), self.batch(0, 0), self.pools, self.scalars(0))
        self.step = step.lower(*arguments).compile()
        self.generate = make_generate(self.model, self.method, NEW_TOKENS, 1, 0, 1, 0.6)

    def start(self, task):
        fresh = noise(10 + task, self.fresh)
        # As a query projection begins.
        projection = {**fresh.query_projection, "scale": fresh.query_projection["scale"] + 1}
        return self.open_state(sharding.place(Trainable(fresh.slot, fresh.key, projection), self.mesh))

    def batch(self, task, step):
        batch = make_batch([task, step], self.model.config.vocab_size)
        return sharding.place_batch(batch, self.mesh)

    def scalars(self, task):
        return sharding.replicate(TaskScalars(*np.array([task, task, STEPS], np.int32)), self.mesh)

    def train(self, frozen, state, task, step):
        state, metrics = self.step(frozen, state, self.batch(task, step), self.pools, self.scalars(task))
        return state, metrics

    def finish(self, frozen, state, task):
        """What a task ends with: weights, answers, and the tree with it in its bank."""
        batch, slot = self.batch(task, 99), np.int32(task)
        tokens, weights = self.generate(frozen, state.trainable, batch["source"], batch["source_mask"], slot)
        target = np.asarray(weights).mean(axis=0)
        after = self.commit(frozen.replace(base=None), state.trainable, target, slot)
        return after.replace(base=self.base), {"tokens": tokens, "weights": weights}


def flat(prefix, tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{prefix} {jax.tree_util.keystr(path)}": np.asarray(x) for path, x in leaves}


def run(case, name, folder):
    """Both tasks; `folder` gets a checkpoint between them and one inside the second."""
    results, frozen = {}, case.frozen
    for task in range(2):
        state = case.start(task)
        for step in range(STEPS):
            state, metrics = case.train(frozen, state, task, step)
            results |= flat(f"{name} task {task} step {step}", (metrics, state))
            if folder and (task, step) == (1, 0):
                save(folder, state)
        frozen, found = case.finish(frozen, state, task)
        results |= flat(f"{name} task {task} end", (found, frozen.replace(base=None)))
        if folder and task == 0:
            checkpoints.save_committed(folder, frozen, state.trainable)
    return results


def save(folder, state):
    saver = checkpoints.TaskCheckpoints(folder)
    saver.save(state, state.trainable, checkpoints.Loop(step=1))
    saver.close()


def go_on(case, name, folder):
    """The second task from the checkpoints of another mesh: its last step and its end."""
    frozen, _ = checkpoints.load_committed(folder, case.frozen, case.start(0).trainable)
    saver = checkpoints.TaskCheckpoints(folder)
    state, best, loop = saver.restore(case.start(0))
    saver.close()
    assert loop.step == 1
    results = flat(f"{name} best", best) | flat(f"{name} task 1 step 0", (None, state))
    state, metrics = case.train(frozen, state, 1, 1)
    results |= flat(f"{name} task 1 step 1", (metrics, state))
    frozen, found = case.finish(frozen, state, 1)
    return results | flat(f"{name} task 1 end", (found, frozen.replace(base=None)))


def spec_lines(tree):
    """One line for each array: its name, its shape and what splits each of its axes."""
    lines = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        spec = tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
        split = [axis if isinstance(axis, str) or not axis else "*".join(axis) for axis in spec]
        dims = ", ".join(f"{size}/{axis}" if axis else f"{size}" for size, axis in zip(x.shape, split, strict=True))
        lines.append(f"  {jax.tree_util.keystr(path).lstrip('.')}: [{dims}]")
    return lines


def activation_lines(case):
    """Shardings of a batch, and of what decoding starts with, as the compiler leaves them."""
    batch = case.batch(0, 0)
    state = case.start(0)

    def prefill(frozen, trainable, source, source_mask):
        logits, cache, decode_step, weights = read_source(
            case.model, case.method, NEW_TOKENS, frozen, trainable, source, source_mask, np.int32(0), 1
        )
        next_logits, next_cache = decode_step(jnp.argmax(logits, axis=-1).astype(jnp.int32), cache)
        return {
            "logits": logits,
            "cache": cache,
            "weights": weights,
            "next": {"logits": next_logits, "cache": next_cache},
        }

    read = jax.jit(prefill)(case.frozen, state.trainable, batch["source"], batch["source_mask"])
    return spec_lines({"batch": batch, "state": state, "pools": case.pools, "read": read})


def config_lines(name):
    """Shardings of the parameters and PET arrays of a named config on the eight-device form of its mesh."""
    config = importlib.import_module(f"configs.{name}").get_config()
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    model = make_model(
        VARIANTS["smollm2-135m"] if "smollm2" in config.model.path else shape_of(config), "bfloat16", "none"
    )
    method = make_method(config)
    mesh = sharding.make_mesh(sizes)
    sites, d_model = model.pet_sites(model.config), model.config.d_model
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(config.mesh.rules)):
        base = sharding.abstract_params(model, mesh, jnp.bfloat16)
        optimizer = make_optimizer(1e-3, None, None, 0.9, 0.999, 1e-8, 0.0, 1.0)

        def trees(rng, table):
            trainable = method.open_task(rng, sites, table, None)
            return init_frozen(None, method.pet, sites, d_model, method.capacity(15)), init_state(optimizer, trainable)

        frozen, state = jax.eval_shape(trees, jax.random.key(0), base["token_embedder"]["embedding"])
        frozen, state = (
            jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                tree,
                sharding.shardings(tree, mesh),
            )
            for tree in (frozen, state)
        )
    return [str(dict(mesh.shape)), *spec_lines({"frozen": frozen.replace(base=base), "state": state})]


def main(folder, variant, everything):
    results, lines = {}, []
    for pet, chosen in COVER[variant].items():
        title = f"{variant} {pet}"
        with mesh_of(1, 1, 1) as mesh:
            previous = folder / f"{title} one"
            results |= run(Case(variant, pet, mesh), f"{title} one", previous)
        for name in MESHES if everything else chosen:
            with mesh_of(*MESHES[name]) as mesh:
                case = Case(variant, pet, mesh)
                saved = folder / f"{title} {name}"
                results |= run(case, f"{title} {name}", saved)
                # From the checkpoints of the mesh before.
                results |= go_on(case, f"{title} {name} restored", previous)
                if name == "mixed":
                    (folder / f"{title}.hlo").write_text(case.step.as_text())
                    lines += [f"{title} on {dict(mesh.shape)}", *activation_lines(case)]
            previous = saved
    for name in NAMED_CONFIGS:
        family = "t5-tiny" if name.startswith("t5") else "llama-tiny"
        if family == variant:
            mesh, *rest = config_lines(name)
            lines += [f"configs/{name}.py on {mesh}", *rest]
    np.savez(folder / "results.npz", **results)
    (folder / "shardings.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["all"])
