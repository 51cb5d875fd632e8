"""What adapted projections say of their inputs, on both families and every kernel."""

import jax
import numpy as np
import pytest

from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.models.layers import MOMENTS, input_of
from sapt_jax.pet import Lora
from sapt_jax.pet.lora import sites
from sapt_jax.programs import make_apply
from tests.helpers.trees import at, init_base, random_bank

PET = Lora(2, 8.0, targets=".*/layers/.*/kernel")


def rms(x, scale):
    x = np.array(x, np.float64)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * np.array(scale, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("llama-tiny", "none"), ("t5-tiny", "none"), ("t5-tiny", "full")])
def test_moments_are_of_each_projection_s_own_input_over_tokens(name, remat):
    """In the first layer that is the normed embeddings; projections share a name where they read the same."""
    model = make_model(VARIANTS[name], "float32", remat)
    base, apply = init_base(model), make_apply(model)
    rng = np.random.default_rng(9)
    batch = {name: rng.integers(3, 90, (3, n)).astype(np.int32) for name, n in (("source", 6), ("target", 5))}
    lengths = np.array([4, 6, 0])[:, None]
    left = model.padding_side == "left"
    batch["source_mask"] = np.arange(6) >= 6 - lengths if left else np.arange(6) < lengths
    batch["target_mask"] = np.arange(5) < np.array([5, 3, 0])[:, None]
    # Blocks without an effect, so that the encoder's states are those of the bare model.
    bank = jax.tree.map(lambda x: 0 * x, random_bank(PET, model, 1, 0))
    mixture = PET.mix(bank, np.ones((3, 1), np.float32), at(0).slot)
    answers = [batch[name] for name in ("source", "source_mask", "target", "target_mask")]
    totals = jax.jit(lambda mixture: apply(base, *answers, mixture, collect=MOMENTS))(mixture)
    found = {site: own["input"] for site, own in sites(totals).items()}
    assert found.keys() == sites(bank).keys()

    def check(moment, states, mask):
        x = np.array(states, np.float64)[mask]
        np.testing.assert_allclose(moment, sum(np.outer(row, row) for row in x), rtol=1e-4, atol=1e-4)

    table, stack = np.array(base["token_embedder"]["embedding"], np.float64), ("decoder", "layers")
    if left:
        ids = np.concatenate([batch["source"], batch["target"][:, :-1]], axis=1)
        mask = np.concatenate([batch["source_mask"], batch["target_mask"][:, :-1]], axis=1)
    else:
        ids, mask = np.pad(batch["target"][:, :-1], ((0, 0), (1, 0))), batch["target_mask"]
        first = rms(table[batch["source"]], base["encoder"]["layers"]["pre_attention_layer_norm"]["scale"][0])
        check(found["encoder", "layers", "attention", "query"][0], first, batch["source_mask"])
        encoded = apply(base, batch["source"], batch["source_mask"], method="encode")
        for layer in range(model.config.num_decoder_layers):
            check(found[*stack, "encoder_decoder_attention", "value"][layer], encoded, batch["source_mask"])
    first = rms(table[ids], base["decoder"]["layers"]["pre_self_attention_layer_norm"]["scale"][0])
    check(found[*stack, "self_attention", "value"][0], first, mask)
    by_input = {}
    for site, moment in found.items():
        by_input.setdefault(input_of(site), []).append(np.array(moment))
    for moments in by_input.values():
        for moment in moments[1:]:
            np.testing.assert_allclose(moment, moments[0], rtol=1e-5, atol=1e-5)
    firsts = [moments[0] for moments in by_input.values()]
    assert not any(x.shape == y.shape and np.allclose(x, y) for i, x in enumerate(firsts) for y in firsts[:i])
