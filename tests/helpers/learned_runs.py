"""Workdirs of runs that have learned random blocks on a small random transformers model, and what we make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax.config import default_config, make_method
from sapt_jax.decoding.answers import Ends, Search, make_generate
from sapt_jax.export.learned import Ended, declared_state, read_run, write_run
from sapt_jax.export.to_hf import write_merged
from sapt_jax.export.to_peft import write_mixture
from sapt_jax.models.families import make_model, read_shape
from sapt_jax.pretrained.loading import load_pretrained
from sapt_jax.programs import make_apply
from sapt_jax.sharding import AXES, abstract_params, make_mesh
from sapt_jax.state import Task, is_leaf
from tests.helpers import llama_reference, t5_reference

TASKS = ("first", "second", "third")
# The query projection is as wide as the paper's code can load it.
RANK, ALPHA, PROMPT, HIDDEN = 2, 6.0, 3, 100
# LoRA on every kernel of the layers, at a scale that leaves something of the base.
EVERYWHERE = {"pet.targets": r".*/layers/.*/kernel", "pet.alpha": 1.0}
FAMILIES = {
    "t5": lambda seed: make_t5("v1.1", seed),
    "t5 tied": lambda seed: make_t5("v1.0", seed),
    # The only T5s that the paper's code runs: heads * d_kv == d_model.
    "t5 square": lambda seed: make_t5("v1.1", seed, num_heads=2, d_kv=8),
    "llama": lambda seed: llama_reference.make_reference("multi-head, untied", seed),
    "llama grouped": lambda seed: llama_reference.make_reference("grouped, tied", seed),
    "llama of bytes": lambda seed: make_byte_llama(seed),
    "t5 of bytes": lambda seed: make_t5("v1.1", seed, vocab_size=384),
}


def make_t5(generation, seed, **overrides):
    """A T5 that says something of its source, which a random one hardly sees."""
    # transformers' cache fails where a T5's decoder is deeper than its encoder.
    model = t5_reference.make_reference(generation, seed, num_decoder_layers=2, **overrides)
    with t5_reference.torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("EncDecAttention.v.weight", "EncDecAttention.o.weight")):
                weight.mul_(3)
    return model


def make_byte_llama(seed):
    """A LLaMA with a row for each id of the byte tokenizer."""
    transformers = llama_reference.transformers
    llama_reference.torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=384, max_position_embeddings=128, **sizes))


def make_base(family, folder, seed=0):
    """A random transformers model, saved in `folder`; returns the model."""
    model = FAMILIES[family](seed)
    model.save_pretrained(folder)
    return model


def make_config(base, kind, **overrides):
    config = default_config()
    config.benchmark, config.task_order = "own", ",".join(TASKS)
    config.model.path = str(base)
    config.model.dtype = config.model.param_dtype = "float32"
    config.pet.kind, config.pet.rank, config.pet.alpha, config.pet.prompt_length = kind, RANK, ALPHA, PROMPT
    config.sapt.query_hidden = HIDDEN
    config.update_from_flattened_dict(overrides)
    return config


def make_run(folder, family, kind, seed=1, tasks=TASKS, **overrides):
    """Writes BASE and RUN into `folder`: every array random. Returns (the transformers model, the run's workdir)."""
    base = folder / "base"
    model = make_base(family, base, seed)
    config = make_config(base, kind, **overrides)
    shape = read_shape(config.model.path, "")
    method, (_, trainable) = make_method(config), declared_state(config, shape, 1)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = getattr(path[-1], "key", "")
        # Blocks that move the logits without drowning the base.
        drawn = {"a": 0.5, "b": 0.3, "prompt": 0.7}.get(name, 1.0) * rng.standard_normal(leaf.shape)
        # What all pooled inputs have in common cancels, so that rows attend to different tasks.
        is_down = any(getattr(key, "key", "") == "down" for key in path)
        return (drawn - drawn.mean(axis=0) if is_down else drawn).astype(np.float32)

    ended = {}
    for index, task in enumerate(tasks):
        target = rng.dirichlet(np.ones(index + 1)).astype(np.float32) if method.mixing == "attention" else None
        ended[task] = Ended(jax.tree_util.tree_map_with_path(draw, trainable, is_leaf=is_leaf), target)
    write_run(config, shape, ended, folder / "run")
    return model, folder / "run"


def make_rows(family, seed, rows=5):
    """Source and mask [B, L] of different lengths, padded as the family is; every row a mixture of its own."""
    make_batch = llama_reference.make_batch if family.startswith("llama") else t5_reference.make_batch
    return make_batch(seed, rows=rows)


def llama_logits(folder, batch, adapter=None):
    """Teacher-forced logits [B, L, V] of a transformers LLaMA in a folder, with an adapter of PEFT where given."""
    model = llama_reference.transformers.AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, adapter)
    return llama_reference.reference_logits(model.eval(), batch)


def assert_exports_answer(learned, weights, batch, wanted, folder):
    """A LLaMA of transformers has these logits on answers, with the mixture merged into it and as PEFT's adapter."""
    real, base = batch["target_mask"], learned.config.model.path
    write_merged(learned, weights, folder / "merged")
    write_mixture(learned, weights, folder / "adapter")
    for found in (llama_logits(folder / "merged", batch), llama_logits(base, batch, folder / "adapter")):
        np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


class Ours:
    """Our model with what a run learned."""

    def __init__(self, workdir):
        self.learned = read_run(workdir)
        config, shape = self.learned.config, self.learned.shape
        self.model, self.method = make_model(shape, "float32", "none"), make_method(config)
        mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
        params = load_pretrained(config.model.path, abstract_params(self.model, mesh, jnp.float32))
        self.frozen = self.learned.frozen.replace(base=params)
        self.trainable = self.learned.trainables[-1]
        index = len(self.learned.tasks) - 1
        self.task = Task(np.int32(index), np.int32(self.method.slot_index(index)), np.int32(0))
        self._apply = make_apply(self.model)
        self._logits = jax.jit(self._compute_logits)

    def attention(self, batch):
        """The mixture's weights [B, T] by our method."""
        features = self.method.features(self._apply, self.frozen.base, batch["source"], batch["source_mask"])
        return self.method.weights(self.frozen, self.trainable, features, self.task, training=False)

    def logits(self, batch, weights):
        """Teacher-forced logits [B, L, V] under given weights [T] or [B, T]."""
        weights = jnp.broadcast_to(jnp.asarray(weights), (len(batch["source"]), len(self.learned.slots)))
        return np.asarray(self._logits(batch, weights))

    def _compute_logits(self, batch, weights):
        mixture = self.method.mixture(self.frozen, self.trainable, weights, self.task)
        names = ("source", "source_mask", "target", "target_mask")
        return self._apply(self.frozen.base, *(batch[name] for name in names), mixture)

    def generate(self, batch, new_tokens, eos_id):
        """Greedy answers [B, new_tokens], padded with 0, and the weights [B, T]."""
        generate = make_generate(self._apply, self.method, Ends(new_tokens, eos_id, 0), Search())
        tokens, weights = generate(self.frozen, self.trainable, batch["source"], batch["source_mask"], self.task)
        return np.asarray(tokens), np.asarray(weights)
