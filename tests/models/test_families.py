"""What the families say of their models: parameters by path with their axes, and what is asked of a shape."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict

from sapt_jax.models.families import FAMILIES, VARIANTS, Parameter, family_of, make_model, parameters
from sapt_jax.models.kernels import KERNELS
from sapt_jax.models.layers import REMAT
from sapt_jax.pretrained.loading import TABLES


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["t5-tiny", "llama-tiny"])
def test_parameters_are_those_that_a_model_is_made_with(variant):
    model = make_model(VARIANTS[variant], "float32", "none")
    ids = jnp.zeros((1, 2), int)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids > 0, ids, ids > 0)["params"])
    assert {path: array.shape for path, array in flatten_dict(params, sep="/").items()} == {
        path: parameter.shape for path, parameter in parameters(model).items()
    }


def test_parameters_name_the_axes_of_each_dimension():
    found = parameters(make_model(VARIANTS["llama-tiny"], "bfloat16", "full"))
    attention = "decoder/layers/self_attention"
    assert found[f"{attention}/value/kernel"] == Parameter((2, 32, 16), ("layers", "embed", "kv_heads"))
    assert found[f"{attention}/out/kernel"] == Parameter((2, 32, 32), ("layers", "heads", "embed"))
    assert found["token_embedder/embedding"] == Parameter((384, 32), ("vocab", "embed"))


def test_a_shape_knows_its_family():
    for family in FAMILIES:
        assert all(family_of(shape) is family for shape in family.variants.values())
        assert all(family.tables[form] is TABLES[kind, form] for kind in family.model_types for form in family.tables)
    for name, encodes, layers in (("t5-large", True, 24), ("llama-2-13b", False, 40)):
        family = family_of(VARIANTS[name])
        assert (family.is_encoder_decoder, family.decoder_layers(VARIANTS[name])) == (encodes, layers)


def test_every_named_choice_makes_a_model_and_others_are_refused():
    shape = VARIANTS["llama-tiny"]
    for remat in REMAT:
        assert parameters(make_model(shape, "bfloat16", remat)) == parameters(make_model(shape, "bfloat16", "none"))
    for attention in KERNELS:
        assert make_model(shape, "bfloat16", "none", attention).kernel == attention
    with pytest.raises(ValueError, match="config.model.dtype='float16' is unknown; choose one of float32, bfloat16"):
        make_model(shape, "float16", "none")
