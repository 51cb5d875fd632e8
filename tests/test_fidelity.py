"""Training as the paper's released code does it: five updates against its algorithm, written out in float64 PyTorch.

docs/fidelity.md names this test: what it compares, and every deviation that is left.
"""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sapt_jax.config import flatten, make_method
from sapt_jax.methods.base import Samples
from sapt_jax.models.families import make_model
from sapt_jax.models.shapes import llama_config_from_hf, t5_config_from_hf
from sapt_jax.programs import TrainState, make_apply, make_train_step, optimizer_of
from tests.helpers.paths import REPOSITORY
from tests.helpers.sapt_reference import Reference, base_model, to_torch
from tests.helpers.trees import at, fresh, init_base, noise, random_frozen

TASKS, TASK, UPDATES, ROWS = 4, 2, 5, 16
READ = {"t5": t5_config_from_hf, "llama": llama_config_from_hf}
CONFIGS = {
    "t5": (
        "t5_large_superni",
        {
            "model_type": "t5",
            "vocab_size": 50,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-6,
            "tie_word_embeddings": True,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
    ),
    "llama": (
        "llama2_7b_superni",
        {
            "model_type": "llama",
            "vocab_size": 50,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 6,
            "intermediate_size": 40,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        },
    ),
}


def make_batch(seed, padding_side):
    """Rows of all lengths, the last of them filler; the token at padding is 1."""
    rng = np.random.default_rng(seed)
    mask = np.arange(9) < rng.integers(2, 10, (ROWS, 1))
    mask[-1] = False
    source_mask = mask[:, ::-1] if padding_side == "left" else mask
    target_mask = np.arange(5) < rng.integers(1, 6, (ROWS, 1))
    target_mask[-1] = False
    draw = rng.integers(3, 50, (ROWS, 14))
    return {
        "source": np.where(source_mask, draw[:, :9], 1).astype(np.int32),
        "source_mask": source_mask,
        "target": np.where(target_mask, draw[:, 9:], 1).astype(np.int32),
        "target_mask": target_mask,
    }


class HfAdamW:
    """transformers' AdamW without weight decay, under torch's clipping, in place."""

    def __init__(self, parameters, rate):
        self.parameters, self.rate, self.updates = parameters, rate, 0
        self.moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in parameters]

    @torch.no_grad()
    def step(self):
        self.updates += 1
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        size = self.rate * math.sqrt(1 - 0.999**self.updates) / (1 - 0.9**self.updates)
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            first.mul_(0.9).add_(parameter.grad, alpha=0.1)
            second.mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
            parameter -= size * first / (second.sqrt() + 1e-8)
            parameter.grad = None


def as_released(kind, setup, frozen, trainable, batches, features):
    """Task and reflection losses of five updates, and the trainable leaves after them."""
    config, hf_config, method = setup
    leaves, treedef = jax.tree.flatten(trainable)
    leaves = [to_torch(x, requires_grad=True) for x in leaves]
    own = jax.tree.unflatten(treedef, leaves)
    hf = base_model(hf_config, frozen.base)
    reference = Reference(kind, hf, method, frozen, own.slot, own.selector, TASK)
    optimizer, micro_batches, losses = HfAdamW(leaves, config.optimizer.learning_rate), 4, []
    for update, batch in enumerate(batches):
        task_loss = 0.0
        for place in range(micro_batches):
            nll, tokens, _ = reference.nll({name: rows[place::micro_batches] for name, rows in batch.items()})
            task_loss = task_loss + nll / tokens / micro_batches
        reflection = reference.reflection(features)
        (task_loss + (method.kl_ratio * reflection if update > 0 else 0.0)).backward()
        optimizer.step()
        losses.append((float(task_loss.detach()), float(reflection.detach())))
    return losses, [x.detach().numpy() for x in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_five_updates_are_those_of_the_released_code(kind):
    """Blocks, keys and projection move by about 1e-3, and end within 1e-5; so do the losses of every update."""
    name, hf_config = CONFIGS[kind]
    config = importlib.import_module(f"configs.{name}").get_config("protocol=released")
    assert config.train.accumulation == 4
    config.model.dropout = 0.0
    model, method = make_model(READ[kind](hf_config), "float32", "none"), make_method(config)
    base = init_base(model, 1)
    frozen = random_frozen(method, model, base, TASKS, 2)
    trainable = fresh(method, model, base, 3)
    trainable = trainable.replace(slot=noise(4, trainable.slot))
    batches = [make_batch(10 + number, model.padding_side) for number in range(UPDATES)]
    # One pseudo-sample of each task, so that what an update draws is known.
    features = np.random.default_rng(5).normal(0, 0.5, (TASKS, 24)).astype(np.float32)

    optimizer = optimizer_of(config)
    step = jax.jit(make_train_step(config, make_apply(model), method, optimizer))
    state = TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))
    samples = Samples(jnp.asarray(features[:, None]), jnp.ones((TASKS,), jnp.int32))
    setup = (config, hf_config, method)
    losses, leaves = as_released(kind, setup, frozen, trainable, batches, features)
    errors = []
    for number, batch in enumerate(batches):
        state, metrics = step(frozen, state, batch, samples, at(TASK, steps=UPDATES))
        found = (metrics["task_loss"], metrics["reflection_loss"])
        np.testing.assert_allclose(found, losses[number], rtol=1e-5)
        total = losses[number][0] + (method.kl_ratio * losses[number][1] if number else 0.0)
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
        errors.append(np.max(np.abs(np.array(found) / losses[number] - 1)))
    moved = [np.abs(np.asarray(x) - y).max() for x, y in zip(jax.tree.leaves(trainable), leaves, strict=True)]
    off = [np.abs(np.asarray(x) - y).max() for x, y in zip(jax.tree.leaves(state.trainable), leaves, strict=True)]
    print(f"{kind}: losses {max(errors):.1e}, weights {max(off):.1e} of {max(moved):.1e}")
    rate = config.optimizer.learning_rate
    assert min(moved) > rate
    assert max(off) < min(1e-5, 5e-3 * max(moved))


def test_the_page_names_every_switch_of_the_protocol_and_tests_that_exist():
    text = (REPOSITORY / "docs/fidelity.md").read_text(encoding="utf-8")
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(tests) > 10
    assert [name for file, name in tests if f"def {name}(" not in (REPOSITORY / file).read_text()] == []
    told = text.split("## Deviations with a switch")[1].split("Where `released`")[0]
    changed = set()
    for name, _ in CONFIGS.values():
        make = importlib.import_module(f"configs.{name}").get_config
        mended, released = (flatten(make(f"protocol={protocol}")) for protocol in ("mended", "released"))
        changed |= {setting for setting in mended if mended[setting] != released[setting]}
    assert set(re.findall(r"`(\w+\.\w+)`", told)) == changed
