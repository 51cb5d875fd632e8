"""SAPT written out in PyTorch and float64: a loop over rows, blocks and pseudo-samples, no factored mixture.

The language models are those of transformers, with the blocks added by hooks.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import torch
import transformers

from sapt_jax.methods.sapt import Sapt
from sapt_jax.pretrained import llama_weights, t5_weights
from sapt_jax.pretrained.rules import to_foreign
from sapt_jax.state import Frozen

TABLES = {"llama": llama_weights.hf_table, "t5": t5_weights.hf_table}
# Where attention modules lie in our tree: the name of their part, and the modules of a model of transformers in order.
ATTENTIONS = {
    "llama": {("decoder", "self_attention"): lambda hf: [layer.self_attn for layer in hf.model.layers]},
    "t5": {
        ("encoder", "attention"): lambda hf: [block.layer[0].SelfAttention for block in hf.encoder.block],
        ("decoder", "self_attention"): lambda hf: [block.layer[0].SelfAttention for block in hf.decoder.block],
        ("decoder", "encoder_decoder_attention"): lambda hf: [
            block.layer[1].EncDecAttention for block in hf.decoder.block
        ],
    },
}
PROJECTIONS = {"llama": {"query": "q_proj", "value": "v_proj"}, "t5": {"query": "q", "value": "v"}}


def to_torch(x, requires_grad=False):
    return torch.tensor(np.array(x, np.float64), requires_grad=requires_grad)


def base_model(hf_config: dict[str, Any], base: Any) -> torch.nn.Module:
    """transformers' model of a config.json with our base parameters, frozen, in float64, without dropout."""
    kind = hf_config["model_type"]
    options = {name: value for name, value in hf_config.items() if name != "model_type"}
    if kind == "llama":
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    else:
        hf = transformers.T5ForConditionalGeneration(transformers.T5Config(**options))
    hf = hf.double().eval()
    weights = to_foreign(base, TABLES[kind](hf_config))
    _, unexpected = hf.load_state_dict({name: to_torch(weight) for name, weight in weights.items()}, strict=False)
    assert not unexpected
    return hf.requires_grad_(False)


@dataclasses.dataclass
class Reference:
    """The losses of a task.

    Attributes:
      kind: "llama" or "t5".
      hf: the base model.
      method: SAPT with its settings.
      frozen: our frozen tree.
      slot, selector: the trainable tree, of torch's leaves.
    """

    kind: str
    hf: torch.nn.Module
    method: Sapt
    frozen: Frozen
    slot: Any
    selector: Any
    task_index: int

    def __post_init__(self):
        pet, earlier = self.method.pet, range(self.task_index)
        self.blocks = [jax.tree.map(to_torch, pet.read(self.frozen.bank, t)) for t in earlier] + [self.slot]
        self.keys = [to_torch(key) for key in self.frozen.memory["keys"][: self.task_index]] + [self.selector["key"]]
        self.table = self.hf.get_input_embeddings().weight

    def attention(self, pooled: torch.Tensor) -> torch.Tensor:
        """Weights of all blocks for a pooled input [D]."""
        projection = self.selector["query_projection"]
        hidden = torch.nn.functional.silu(pooled @ projection["down"]["kernel"] @ projection["up"]["kernel"])
        norm = projection["norm"]["scale"], projection["norm"]["bias"]
        query = torch.nn.functional.layer_norm(hidden, pooled.shape, *norm, 1e-5)
        scores = torch.stack([(query * key).sum(-1) / len(pooled) ** 0.5 for key in self.keys], dim=-1)
        return torch.softmax(scores, dim=-1)

    def nll(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, int, torch.Tensor]:
        """The summed negative log-likelihood of the answers of a batch, their tokens, and the sum of the weights."""
        nll, tokens, total = 0.0, 0, 0.0
        longest = batch["source_mask"].sum(axis=1).max()
        for row in np.flatnonzero(batch["source_mask"].any(axis=1)):
            mask = batch["source_mask"][row]
            source = torch.tensor(batch["source"][row][mask], dtype=torch.long)
            target = torch.tensor(batch["target"][row][batch["target_mask"][row]], dtype=torch.long)
            seen = self.table[source]
            if self.method.pool_padding and len(source) < longest:
                seen = torch.cat([seen, self.table[batch["source"][row][~mask][:1]]])
            weights = self.attention(seen.max(dim=0).values)
            log_probabilities = torch.log_softmax(self._logits(source, target, weights), dim=-1)
            nll = nll - log_probabilities.gather(-1, target[:, None]).sum()
            tokens, total = tokens + len(target), total + weights
        return nll, tokens, total

    def reflection(self, features: np.ndarray) -> torch.Tensor:
        """The reflection loss, of one pseudo-sample's features [D] for each task."""
        total = torch.zeros((), dtype=torch.float64)
        for earlier in range(self.task_index):
            target = to_torch(self.frozen.memory["reflection_targets"][earlier, : self.task_index + 1])
            now = self.attention(to_torch(features[earlier]))
            for goal, weight in zip(target, now, strict=True):
                if goal > 0:
                    total = total + goal * (torch.log(goal) - torch.log(weight))
        return total

    def _logits(self, source: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of an answer's tokens."""
        embedded = self.table[source]
        if "prompt" in self.slot:
            prompt = sum(weight * block["prompt"] for weight, block in zip(weights, self.blocks, strict=True))
            embedded = torch.cat([prompt, embedded])
        hooks = self._hooks(weights)
        if self.kind == "t5":
            shifted = torch.cat([torch.zeros(1, dtype=torch.long), target[:-1]])
            logits = self.hf(inputs_embeds=embedded[None], decoder_input_ids=shifted[None]).logits[0]
        else:
            read = len(embedded)
            logits = self.hf(inputs_embeds=torch.cat([embedded, self.table[target]])[None]).logits[0]
            logits = logits[read - 1 : read - 1 + len(target)]
        for hook in hooks:
            hook.remove()
        return logits

    def _hooks(self, weights: torch.Tensor) -> list[Any]:
        """Hooks that add the weighted blocks to what adapted projections give."""
        if "prompt" in self.slot:
            return []
        hooks = []
        for (stack, part), modules in ATTENTIONS[self.kind].items():
            for layer, module in enumerate(modules(self.hf)):
                for ours, theirs in PROJECTIONS[self.kind].items():
                    sites = [block[stack]["layers"][part][ours] for block in self.blocks]
                    hook = functools.partial(self._add_blocks, layer=layer, sites=sites, weights=weights)
                    hooks.append(getattr(module, theirs).register_forward_hook(hook))
        return hooks

    def _add_blocks(self, module, inputs, output, *, layer, sites, weights):
        pet = self.method.pet
        for number, site in enumerate(sites):
            h = inputs[0]
            if pet.stop_gradient_through_bank and number < self.task_index:
                h = h.detach()
            output = output + weights[number] * (pet.alpha / pet.rank) * (h @ site["a"][layer]) @ site["b"][layer]
        return output
