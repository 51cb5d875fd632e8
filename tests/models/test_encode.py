"""What the bare models make of a source after some of their layers, against PyTorch transformers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from sapt_jax.models.llama import Llama
from sapt_jax.models.shapes import llama_config_from_hf, t5_config_from_hf
from sapt_jax.models.t5 import T5
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from tests.helpers import llama_reference, t5_reference

FAMILIES = {
    "llama": (llama_reference, "grouped, tied", Llama, llama_config_from_hf),
    "t5": (t5_reference, "v1.1", T5, t5_config_from_hf),
    "umt5": (t5_reference, "umt5", T5, t5_config_from_hf),
}


@pytest.mark.parametrize("family", ["llama", "t5", pytest.param("umt5", marks=pytest.mark.slow)])
def test_states_after_some_layers_match_transformers(family, tmp_path):
    module, kind, model_class, read = FAMILIES[family]
    reference, batch = module.make_reference(kind, 3), module.make_batch(4)
    reference.save_pretrained(tmp_path)
    reference = reference.double()
    model = model_class(read(read_model_config(tmp_path)), jnp.float32, "none")
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
    boxed = jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"]
    variables = {"params": load_pretrained(tmp_path, meta.unbox(boxed))}

    def encode(layers):
        return model.apply(variables, batch["source"], batch["source_mask"], layers, method="encode")

    depth = reference.config.num_hidden_layers
    below, every, beyond, normed = jax.jit(lambda: tuple(map(encode, (depth - 1, depth, depth + 5, None))))()
    stack = reference.get_encoder() if reference.config.is_encoder_decoder else reference.model
    for row in range(3):
        real = batch["source_mask"][row]
        with torch.no_grad():
            ids = torch.tensor(batch["source"][row][real]).long()[None]
            states = stack(ids, output_hidden_states=True).hidden_states
        np.testing.assert_allclose(below[row][real], states[depth - 1][0].numpy(), atol=1e-4)
        np.testing.assert_allclose(normed[row][real], states[depth][0].numpy(), atol=1e-4)
    np.testing.assert_array_equal(beyond, every)
    # The last layer's states are the model's up to the norm: one scale for each dimension, the same for all tokens.
    states, normed = (np.array(x, np.float64)[batch["source_mask"]] for x in (every, normed))
    scale = normed / (states / np.sqrt(np.square(states).mean(axis=-1, keepdims=True) + 1e-6))
    np.testing.assert_allclose(scale, np.broadcast_to(scale[:1], scale.shape), rtol=1e-3)
