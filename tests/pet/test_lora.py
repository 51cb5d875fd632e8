"""The bank and its mixture, LoRA and prompts, against a loop over blocks in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapt_jax import pet, state
from sapt_jax.models.families import VARIANTS, Parameter, make_model, parameters
from sapt_jax.models.layers import lora_delta

LAYERS = "decoder/layers/self_attention"
PARAMETERS = {
    "token_embedder/embedding": Parameter((11, 8), ("vocab", "embed")),
    f"{LAYERS}/query/kernel": Parameter((2, 8, 12), ("layers", "embed", "heads")),
    f"{LAYERS}/key/kernel": Parameter((2, 8, 6), ("layers", "embed", "kv_heads")),
    f"{LAYERS}/value/kernel": Parameter((2, 8, 6), ("layers", "embed", "kv_heads")),
    f"{LAYERS}/out/kernel": Parameter((2, 12, 8), ("layers", "heads", "embed")),
    "decoder/logits_dense/kernel": Parameter((8, 11), ("embed", "vocab")),
}
TABLE = np.random.default_rng(9).normal(size=(11, 8)).astype(np.float32)
BASE = {"token_embedder": {"embedding": jnp.asarray(TABLE)}}
LORA = pet.Lora(rank=2, alpha=12.0)
PROMPT = pet.Prompt(length=3)
KINDS = pytest.mark.parametrize("kind", [LORA, PROMPT], ids=["lora", "prompt"])


def init_block(kind, seed):
    return state.start(jax.random.key(seed), kind.block(PARAMETERS), BASE)


def empty_bank(kind, tasks):
    return state.start(jax.random.key(0), state.bank_of(kind.block(PARAMETERS), tasks), None)


def random_bank(kind, seed, tasks):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), empty_bank(kind, tasks))


@pytest.mark.slow
def test_lora_mixture_equals_a_loop_over_blocks():
    rng = np.random.default_rng(0)
    tasks, kind = 5, pet.Lora(rank=3, alpha=12.0)
    bank = random_bank(kind, 1, tasks)
    weights = rng.dirichlet(np.ones(tasks), 4)
    x = rng.normal(size=(4, 7, 8))
    mixture = kind.mix(bank, jnp.asarray(weights, jnp.float32), 0)
    for projection in ("query", "value"):
        for layer in range(2):
            stored = mixture.blocks["decoder"]["layers"]["self_attention"][projection]
            block = {name: stored[name][layer] for name in ("a", "b")}
            found = lora_delta(jnp.asarray(x, jnp.float32), block, mixture, jnp.float32)
            expected = 0.0
            for t in range(tasks):
                one = kind.read(bank, t)["decoder"]["layers"]["self_attention"][projection]
                a, b = (np.array(one[name][layer], np.float64) for name in ("a", "b"))
                expected = expected + weights[:, t, None, None] * (12.0 / 3) * (x @ a @ b)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_prompt_mixture_equals_a_loop_over_prompts():
    bank = random_bank(PROMPT, 4, 5)
    weights = np.random.default_rng(5).dirichlet(np.ones(5), 4)
    found = PROMPT.mix(bank, jnp.asarray(weights, jnp.float32), 0).prompt
    expected = sum(
        weights[:, t, None, None] * np.array(PROMPT.read(bank, t)["prompt"], np.float64)[None] for t in range(5)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@KINDS
def test_write_changes_one_slot_and_read_returns_it(kind):
    bank = random_bank(kind, 2, 4)
    slot = jax.tree.map(lambda x: x + 1.0, init_block(kind, 0))
    written = kind.write(bank, slot, jnp.asarray(2))
    jax.tree.map(np.testing.assert_array_equal, kind.read(written, 2), slot)
    for t in (0, 1, 3):
        jax.tree.map(np.testing.assert_array_equal, kind.read(written, t), kind.read(bank, t))


@pytest.mark.slow
@KINDS
def test_gradients_of_a_write_reach_the_slot_alone(kind):
    bank, slot = random_bank(kind, 3, 3), init_block(kind, 1)

    def total(bank, slot):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(kind.write(bank, slot, 1)))

    bank_gradient, slot_gradient = jax.grad(total, argnums=(0, 1))(bank, slot)
    assert not any(np.any(x) for x in jax.tree.leaves(bank_gradient))
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, 2 * x, rtol=1e-6), slot_gradient, slot)


def test_a_fresh_lora_block_changes_nothing_and_is_bounded():
    block = init_block(pet.Lora(4, 8.0), 2)
    for projection in block["decoder"]["layers"]["self_attention"].values():
        assert not np.any(projection["b"])
        assert 0 < np.abs(projection["a"]).max() <= 8**-0.5
    first, second = (block["decoder"]["layers"]["self_attention"][name]["a"] for name in ("query", "value"))
    assert not np.allclose(first, second)


def test_a_fresh_prompt_is_drawn_from_the_vocabulary():
    prompts = [np.array(init_block(PROMPT, seed)["prompt"]) for seed in range(8)]
    rows = {tuple(row) for prompt in prompts for row in prompt}
    assert rows <= {tuple(row) for row in TABLE}
    assert len(rows) > 6


def test_the_prompt_goes_before_the_input_and_is_seen():
    rng = np.random.default_rng(7)
    embeddings, mask = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.bfloat16), jnp.asarray([[0, 0, 1, 1], [0, 1, 1, 1]])
    mixture = PROMPT.mix(random_bank(PROMPT, 8, 2), jnp.full((2, 2), 0.5), 0)
    x, seen = pet.put_prompt_before(mixture, embeddings, mask.astype(bool))
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x[:, 3:], embeddings)
    np.testing.assert_array_equal(x[:, :3], mixture.prompt.astype(jnp.bfloat16))
    assert seen.astype(int).tolist() == [[1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1]]
    assert mixture.for_answers(3).prompt is None


def targets_of(**fields):
    return set(pet.lora.sites(pet.Lora(rank=2, alpha=4.0, **fields).block(PARAMETERS)))


def test_targets_are_read_off_the_base_tree():
    path = ("decoder", "layers", "self_attention")
    assert targets_of() == {(*path, "query"), (*path, "value")}
    assert targets_of(targets=".*/layers/.*/kernel") == {(*path, name) for name in ("query", "key", "value", "out")}
    assert targets_of(targets=f"{LAYERS}/out/kernel") == {(*path, "out")}


def test_factors_take_the_axes_of_their_kernel():
    block = pet.lora.sites(pet.Lora(rank=3, alpha=4.0, targets=f"{LAYERS}/out/kernel").block(PARAMETERS))
    (factors,) = block.values()
    assert factors["a"].shape == (2, 12, 3) and factors["a"].axes == ("layers", "heads", "rank")
    assert factors["b"].shape == (2, 3, 8) and factors["b"].axes == ("layers", "rank", "embed")
    assert factors["a"].in_bank(5).shape == (2, 12, 5, 3) and factors["b"].in_bank(5).shape == (2, 5, 3, 8)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (".*/nothing/kernel", "matches no parameter: choose among decoder/layers/self_attention/key/kernel"),
        (".*/embedding", "matches token_embedder/embedding, which LoRA cannot adapt"),
        (".*/kernel", "matches decoder/logits_dense/kernel, which LoRA cannot adapt"),
        ("(", "is no regular expression"),
    ],
)
def test_targets_that_cannot_be_are_named(targets, message):
    with pytest.raises(ValueError, match="config.pet.targets=.*" + message):
        targets_of(targets=targets)


@pytest.mark.parametrize(("variant", "count"), [("llama-tiny", 2), ("t5-tiny", 6)])
def test_the_default_is_query_and_value_of_every_attention(variant, count):
    block = LORA.block(parameters(make_model(VARIANTS[variant], "float32", "none")))
    assert len(pet.lora.sites(block)) == count
    assert {path[-1] for path in pet.lora.sites(block)} == {"query", "value"}
