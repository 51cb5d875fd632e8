"""Where transformers keeps the projections that LoRA adapts."""

from typing import Any

from sapt_jax.models.families import make_model
from sapt_jax.models.shapes import T5Config
from sapt_jax.pet import Sites
from sapt_jax.pretrained import llama_weights, t5_weights

# A stack, an attention in it and a projection of that, as in `pet.Sites`.
Site = tuple[str, str, str]


def pet_sites(shape: Any) -> Sites:
    """The projections that LoRA adapts in a model of this shape."""
    return make_model(shape, "float32", "none").pet_sites(shape)


def is_encoder_decoder(shape: Any) -> bool:
    """Whether a model of this shape is a T5."""
    return isinstance(shape, T5Config)


def hf_modules(shape: Any) -> dict[Site, str]:
    """transformers' module of every adapted projection, with `{layer}` for the layer's number."""
    if is_encoder_decoder(shape):
        table = t5_weights.hf_table({"model_type": "t5", "tie_word_embeddings": shape.tie_embeddings})
    else:
        table = llama_weights.hf_table({})
    rules = table.by_path()
    return {
        (stack, attention, projection): rules[kernel_path((stack, attention, projection))].name.removesuffix(".weight")
        for stack, attentions in pet_sites(shape).items()
        for attention, projections in attentions.items()
        for projection in projections
    }


def kernel_path(site: Site) -> str:
    """The path of an adapted projection's kernel in our base tree."""
    stack, attention, projection = site
    return f"{stack}/layers/{attention}/{projection}/kernel"


def at(tree: Any, site: Site) -> Any:
    """What a tree of blocks holds for a site, {"a": ..., "b": ...}."""
    stack, attention, projection = site
    return tree[stack][attention][projection]
