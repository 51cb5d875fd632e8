"""Parameter-efficient (PET) blocks, one file a kind, and their mixture."""

from sapt_jax.pet.base import (
    TASK_AXIS,
    Lora,
    Mixture,
    Pet,
    Prompt,
    Sites,
    grow,
    layer_blocks,
    put_prompt_before,
    read_slot,
    write_slot,
)

__all__ = [
    "TASK_AXIS",
    "Lora",
    "Mixture",
    "Pet",
    "Prompt",
    "Sites",
    "grow",
    "layer_blocks",
    "put_prompt_before",
    "read_slot",
    "write_slot",
]
