"""Writes what a run learned as adapters of Hugging Face's PEFT library.

One task's block is a LoRA adapter of rank R. A mixture of all T blocks is one of rank T*R, whose scale is that of the
blocks, alpha / R; the weights are folded into the columns of B, and A is as the blocks have it. A soft prompt is a
prompt-tuning adapter, for the encoder of a T5 or before the sequence of a LLaMA; a mixture of prompts is their weighted
sum. PEFT's forward pass of a prompted LLaMA counts padding on the left as positions, which ours does not.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sapt_jax.export.learned import Learned
from sapt_jax.export.sites import hf_modules, module_names
from sapt_jax.models.families import family_of
from sapt_jax.pet.lora import sites
from sapt_jax.storage.new_folder import new_folder


def write_task(learned: Learned, task: str, out: Path) -> None:
    """Writes one task's block as an adapter folder.

    Raises:
      ValueError: from `Learned.weights_of`.
      FileExistsError: the folder exists.
    """
    slot = int(np.argmax(learned.weights_of(task)))
    with new_folder(out) as folder:
        _write(learned, [slot], np.ones(1, np.float32), folder)


def write_mixture(learned: Learned, weights: Sequence[float] | None, out: Path) -> None:
    """Writes all blocks, mixed by these weights [T], as one adapter folder.

    Args:
      weights: as of `Learned.mixture`.

    Raises:
      ValueError: from `Learned.mixture`.
      FileExistsError: the folder exists.
    """
    mixture = learned.mixture(weights)
    with new_folder(out) as folder:
        _write(learned, range(len(mixture)), mixture, folder)


def write_all(learned: Learned, out: Path) -> None:
    """Writes every task's block as an adapter folder out/NAME.

    Raises:
      ValueError: from `Learned.check_linear`.
      FileExistsError: the folder exists.
    """
    learned.check_linear()
    with new_folder(out) as folder:
        for slot, name in enumerate(learned.slots):
            (folder / name).mkdir()
            _write(learned, [slot], np.ones(1, np.float32), folder / name)


def _write(learned: Learned, slots: Sequence[int], weights: np.ndarray, folder: Path) -> None:
    make = _prompt if learned.config.pet.kind == "prompt" else _lora
    fields, tensors = make(learned, list(slots), weights)
    config = {
        "task_type": "SEQ_2_SEQ_LM" if family_of(learned.shape).is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": learned.config.model.path or None,
        "inference_mode": True,
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    # safetensors writes the memory as it lies.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _lora(learned: Learned, slots: list[int], weights: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    options, modules = learned.config.pet, hf_modules(learned.shape, learned.frozen.bank)
    tensors = {}
    for site, block in sites(learned.frozen.bank).items():
        a = block["a"][:, :, slots]
        b = block["b"][:, slots] * weights[:, None, None]
        a, b = a.reshape(*a.shape[:2], -1), b.reshape(len(b), -1, b.shape[-1])
        for layer in range(len(a)):
            name = f"base_model.model.{modules[site].replace('{layer}', str(layer))}"
            tensors[f"{name}.lora_A.weight"] = a[layer].T
            tensors[f"{name}.lora_B.weight"] = b[layer].T
    fields = {
        "peft_type": "LORA",
        "r": options.rank * len(slots),
        "lora_alpha": options.alpha * len(slots),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(learned.shape, set(modules.values())),
    }
    return fields, tensors


def _targets(shape: Any, modules: set[str]) -> list[str] | str:
    """PEFT's target_modules: last names where these mean the adapted modules alone, else whole names, by regex."""
    last = {module.rsplit(".", 1)[1] for module in modules}
    if {name for name in module_names(shape).values() if name.rsplit(".", 1)[-1] in last} == modules:
        return sorted(last)
    return "|".join(re.escape(module).replace(re.escape("{layer}"), r"\d+") for module in sorted(modules))


def _prompt(learned: Learned, slots: list[int], weights: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    shape = learned.shape
    prompt = np.einsum("T,TPD->PD", weights, learned.frozen.bank["prompt"][slots])
    fields = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(prompt),
        "token_dim": shape.d_model,
        # PEFT's own choice for a T5 would be one prompt for the encoder and one for the decoder.
        "num_transformer_submodules": 1,
        "num_attention_heads": shape.num_heads,
        "num_layers": family_of(shape).decoder_layers(shape),
        "prompt_tuning_init": "RANDOM",
    }
    return fields, {"prompt_embeddings": prompt}
