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

from sapt_jax import sharding, state
from sapt_jax.config import default_config, make_method
from sapt_jax.decoding.answers import Ends, read_source
from sapt_jax.methods.base import Samples
from sapt_jax.models.families import VARIANTS, init_params, make_model, parameters
from sapt_jax.pet import Lora, Prompt
from sapt_jax.programs import make_apply, make_programs
from sapt_jax.state import Task
from sapt_jax.storage import checkpoints
from sapt_jax.tools.compile_check.programs import shape_of
from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny import tiny_method

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
# Sizes that occur nowhere else, so that a shape in the HLO tells what it is.
TASKS, RANK, PROMPT, ROWS, SOURCE, TARGET, NEW_TOKENS = 3, 5, 6, 8, 11, 7, 4
PETS = {
    # On every kernel, so also on what is split the other way: output projections and the last of the MLP.
    "lora everywhere": Lora(RANK, 10.0, targets=".*/layers/.*/kernel"),
    "prompt": Prompt(PROMPT),
}
# Every mesh with each family and with each PET: compilation is what takes the time.
COVER = {
    "t5-tiny": {"lora everywhere": ("mixed", "tensor"), "prompt": ("data", "fsdp")},
    "llama-tiny": {"lora everywhere": ("mixed", "fsdp", "data"), "prompt": ("tensor", "mixed")},
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
    """A model with a PET on a mesh, its arrays and the programs of its run."""

    def __init__(self, variant, pet, mesh):
        self.mesh = mesh
        self.model, self.method = model_of(variant), tiny_method(pet=PETS[pet])
        abstract = sharding.abstract_params(self.model, mesh, jnp.float32)
        self.base = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params_of(variant), abstract)
        config = default_config()
        # Its state is the gradient after the first step; Adam would divide rounding by rounding.
        config.optimizer.name, config.optimizer.options = "sgd", (("momentum", 0.9),)
        config.optimizer.learning_rate, config.optimizer.max_grad_norm = 0.01, 1e9
        self.programs = make_programs(config, self.model, self.method, mesh, Ends(NEW_TOKENS, 1, 0))
        leaves = self.method.frozen_leaves(parameters(self.model), TASKS)
        frozen = sharding.create(lambda: state.start(jax.random.key(0), leaves, None), leaves, mesh)
        targets = np.tril(np.random.default_rng(1).random((TASKS, TASKS)).astype(np.float32) + 0.1)
        memory = {
            "keys": noise(3, frozen.memory["keys"]),
            "reflection_targets": targets / targets.sum(axis=1, keepdims=True),
        }
        values = frozen.replace(bank=noise(2, frozen.bank), memory=memory, enabled=np.ones((TASKS,), bool))
        self.frozen = sharding.place(values, leaves, mesh).replace(base=self.base)
        width = self.model.config.d_model
        features = noise(4, jax.ShapeDtypeStruct((TASKS, 2, width), jnp.float32), 0.5)
        self.samples = sharding.replicate(Samples(features, np.full((TASKS,), 2, np.int32)), mesh)
        arguments = (self.frozen, self.start(0), self.batch(0, 0), self.samples, self.task(0))
        self.step = self.programs.train_step.lower(*arguments).compile()

    def start(self, task):
        declared = self.method.trainable_leaves(parameters(self.model))
        fresh = noise(10 + task, state.abstract(declared))
        # As a query projection begins.
        fresh.selector["query_projection"]["norm"]["scale"] += 1
        return self.programs.open_state(sharding.place(fresh, declared, self.mesh))

    def batch(self, task, step):
        batch = make_batch([task, step], self.model.config.vocab_size)
        return sharding.place_batch(batch, self.mesh)

    def task(self, index):
        return sharding.replicate(Task(*np.array([index, index, STEPS], np.int32)), self.mesh)

    def train(self, frozen, state, task, step):
        state, metrics = self.step(frozen, state, self.batch(task, step), self.samples, self.task(task))
        return state, metrics

    def finish(self, frozen, state, task):
        """What a task ends with: weights, answers, and the tree with it in its bank."""
        batch, at = self.batch(task, 99), self.task(task)
        tokens, weights = self.programs.generate(frozen, state.trainable, batch["source"], batch["source_mask"], at)
        found = sharding.replicate({"target": np.asarray(weights).mean(axis=0)}, self.mesh)
        after = self.programs.end_task(frozen.replace(base=None), state.trainable, found, at)
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
    batch, state = case.batch(0, 0), case.start(0)

    def prefill(*question):
        read = read_source(make_apply(case.model), case.method, question, NEW_TOKENS, 1)
        next_logits, next_cache = read.decode_step(jnp.argmax(read.logits, axis=-1).astype(jnp.int32), read.cache)
        return {
            "logits": read.logits,
            "cache": read.cache,
            "weights": read.weights,
            "next": {"logits": next_logits, "cache": next_cache},
        }

    read = jax.jit(prefill)(case.frozen, state.trainable, batch["source"], batch["source_mask"], case.task(0))
    return spec_lines({"batch": batch, "state": state, "samples": case.samples, "read": read})


def config_lines(name):
    """Shardings of the parameters and PET arrays of a named config on the eight-device form of its mesh."""
    config = importlib.import_module(f"configs.{name}").get_config()
    sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
    model = make_model(
        VARIANTS["smollm2-135m"] if "smollm2" in config.model.path else shape_of(config), "bfloat16", "none"
    )
    method, mesh = make_method(config), sharding.make_mesh(sizes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.make_rules(config.mesh.rules)):
        frozen = sharding.abstract(method.frozen_leaves(parameters(model), method.capacity(15)), mesh)
        frozen = frozen.replace(base=sharding.abstract_params(model, mesh, jnp.bfloat16))
        state = make_programs(config, model, method, mesh, Ends(1, 1, 0)).state
    return [str(dict(mesh.shape)), *spec_lines({"frozen": frozen, "state": state})]


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
