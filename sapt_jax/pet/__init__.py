"""Parameter-efficient (PET) blocks, one file a kind, and their mixture."""

from sapt_jax.pet.base import Mixture, Pet, at_tokens, layer_blocks, put_prompt_before
from sapt_jax.pet.lora import Lora
from sapt_jax.pet.prompt import Prompt

KINDS: dict[str, type[Pet]] = {kind.kind: kind for kind in (Lora, Prompt)}

__all__ = ["KINDS", "Lora", "Mixture", "Pet", "Prompt", "at_tokens", "layer_blocks", "put_prompt_before"]
