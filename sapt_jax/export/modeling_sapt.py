"""SAPT in PyTorch: one attention over task keys mixes LoRA blocks or prompts for a frozen transformers T5 or LLaMA.

This file needs torch, transformers and safetensors alone. With it beside config.json and model.safetensors:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)    # or, with FOLDER on the import path:
    model = modeling_sapt.SaptModel.from_pretrained(FOLDER)
    tokens = model.generate(input_ids, attention_mask, max_new_tokens=50)

Every row of a batch gets its own mixture: no task is named. B rows, L tokens, D model width, T blocks, R LoRA rank,
P prompt length. The method is that of arXiv 2401.08295, section 3.2.
"""

import contextlib

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import cached_file

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name before transformers 5
    from transformers import PretrainedConfig as PreTrainedConfig

LAYER_NORM_EPSILON = 1e-5


class SaptConfig(PreTrainedConfig):
    """What model.safetensors does not say.

    Attributes:
      base: the pretrained model, a folder or a name on the Hub; None is the folder `base` beside this config.
      is_encoder_decoder: whether the base is a T5.
      width: its model width, D.
      tasks: for each of the T blocks, the task that it learned.
      kind: "lora" or "prompt".
      modules: {block: path of the `nn.Linear` that it adapts, with {layer} for the layer's number}.
      scale: what LoRA's output is multiplied by, alpha / R.
      temperature: multiplies sqrt(D) under the attention scores.
      pool_padding: a row shorter than the longest of its batch also pools its padding, as the paper's code does.
      selection: "attention", "mean": all blocks alike, or "sum": all blocks at weight 1.
    """

    model_type = "sapt"

    def __init__(self, is_encoder_decoder=False, **fields):
        # transformers makes configs without any field, to compare with.
        unset = {"base": None, "width": None, "tasks": [], "kind": "lora", "modules": {}, "scale": 1.0}
        unset |= {"temperature": 1.0, "pool_padding": False, "selection": "attention"}
        own = {name: fields.pop(name, default) for name, default in unset.items()}
        super().__init__(is_encoder_decoder=is_encoder_decoder, **fields)
        # Afterwards, since transformers takes a temperature for one of generation and drops it.
        for name, value in own.items():
            setattr(self, name, value)


class SaptModel(PreTrainedModel):
    """A base model whose linear modules add, for each row, a mixture of LoRA blocks, or that reads a prompt first.

    One batch at a time: the mixture of the batch in work is kept in the model.

    Args:
      config: a `SaptConfig`.
      base: the transformers model.
      tensors: bank.*, enabled [T] bool, and, where there is an attention, keys [T, D] and projection.{down [D, 100],
        up [100, D], scale [D], bias [D]}. A block's `a` is [layers, in, T, R], its `b` [layers, T, R, out];
        `bank.prompt` is [T, P, D].
    """

    config_class = SaptConfig

    def __init__(self, config, base, tensors):
        super().__init__(config)
        _check(config, tensors)
        self.base = base
        groups = {"bank": {}, "projection": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        self.bank = nn.ParameterDict(_frozen(groups["bank"]))
        self.projection = nn.ParameterDict(_frozen(groups["projection"]))
        if "keys" in tensors:
            self.keys = nn.Parameter(tensors["keys"], requires_grad=False)
        self.register_buffer("enabled", tensors["enabled"])
        self._weights = None
        for block, module in config.modules.items():
            for layer in range(len(self.bank[f"{block}_a"])):
                linear = base.get_submodule(module.replace("{layer}", str(layer)))
                sizes = self.bank[f"{block}_a"].shape[1], self.bank[f"{block}_b"].shape[-1]
                if sizes != (linear.in_features, linear.out_features):
                    raise ValueError(f"{module}: the base model has {linear}, the block {block} is of another model")
                linear.register_forward_hook(self._make_hook(block, layer))

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, base=None, **kwargs):
        """Reads a folder (or a repository of the Hub) that holds config.json and model.safetensors.

        Args:
          config: a `SaptConfig` instead of the folder's.
          base: where the base model lies now, or the model itself, instead of what the config says.
          kwargs: `dtype` and `device_map` of the base model, as transformers takes them.
        """
        config = config or SaptConfig.from_pretrained(folder)
        if not isinstance(base, nn.Module):
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            place = base or config.base
            inside = {} if place else {"subfolder": "base"}
            options = {name: kwargs[name] for name in ("dtype", "device_map") if kwargs.get(name) is not None}
            base = auto.from_pretrained(place or folder, **inside, **options)
        tensors = load_file(cached_file(folder, "model.safetensors"), device=str(base.device))
        width = base.get_input_embeddings().weight.shape[1]
        if width != config.width:
            raise ValueError(f"the base model is {width} wide, these blocks are of one with {config.width}")
        return cls(config, base, tensors).eval()

    @torch.no_grad()
    def attention(self, input_ids, attention_mask):
        """The weights [B, T] of all blocks for each row, in the order of `config.tasks`.

        Args:
          input_ids, attention_mask: [B, L], the input without any answer, padded on either side.
        """
        embeddings = self.base.get_input_embeddings()(input_ids).float()
        mask = attention_mask.bool()
        lengths = mask.sum(dim=1)
        pooled_over = mask
        if self.config.pool_padding:
            pooled_over = mask | (lengths < lengths.max())[:, None]
        pooled = embeddings.masked_fill(~pooled_over[..., None], float("-inf")).amax(dim=1)
        pooled = torch.where((lengths > 0)[:, None], pooled, 0.0)
        if self.config.selection in ("mean", "sum"):
            number = self.enabled.sum() if self.config.selection == "mean" else 1
            return (self.enabled / number).expand(len(pooled), -1)
        projection = {name: tensor.float() for name, tensor in self.projection.items()}
        width = pooled.shape[1]
        hidden = F.silu(pooled @ projection["down"] @ projection["up"])
        query = F.layer_norm(hidden, (width,), projection["scale"], projection["bias"], LAYER_NORM_EPSILON)
        scores = query @ self.keys.float().T / (self.config.temperature * width**0.5)
        return scores.masked_fill(~self.enabled, float("-inf")).softmax(dim=-1)

    def forward(self, input_ids, attention_mask, labels=None, weights=None, **kwargs):
        """What the base model returns, under the mixture.

        Args:
          input_ids, attention_mask: [B, L]; for a LLaMA source and answer together.
          labels: as the base takes them. A LLaMA's source is where they are -100.
          weights: [B, T]; computed from the source where None. A LLaMA without labels takes all tokens as source.
          kwargs: for the base.

        Returns:
          Logits have no positions for the prompt.
        """
        decoder_only = not self.config.is_encoder_decoder
        if weights is None:
            source = attention_mask
            if decoder_only and labels is not None:
                source = attention_mask * (labels == -100)
            weights = self.attention(input_ids, source)
        inputs, length = self._inputs(input_ids, attention_mask, weights)
        if decoder_only:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            if labels is not None:
                labels = F.pad(labels, (length, 0), value=-100)
        with self._mixing(weights):
            output = self.base(**inputs, labels=labels, **kwargs)
        if decoder_only and length:
            output.logits = output.logits[:, length:]
        return output

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, weights=None, **kwargs):
        """Answers, as the base's own `generate` returns them; greedy unless `kwargs` say otherwise.

        Args:
          input_ids, attention_mask: [B, L], padded on the right for a T5 and on the left for a LLaMA.
          weights: [B, T]; computed from the input where None.
          kwargs: for the base's `generate`.
        """
        weights = self.attention(input_ids, attention_mask) if weights is None else weights
        inputs, length = self._inputs(input_ids, attention_mask, weights)
        with self._mixing(weights):
            tokens = self.base.generate(**inputs, **{"do_sample": False, **kwargs})
        if length and not self.config.is_encoder_decoder:
            # Given embeddings, transformers returns new tokens alone.
            answers = len(tokens) // len(input_ids)
            tokens = torch.cat([input_ids.repeat_interleave(answers, dim=0), tokens], dim=1)
        return tokens

    def _inputs(self, input_ids, attention_mask, weights):
        """What goes into the base, and the length of the prompt before it."""
        if self.config.kind != "prompt":
            return {"input_ids": input_ids, "attention_mask": attention_mask}, 0
        embeddings = self.base.get_input_embeddings()(input_ids)
        prompt = torch.einsum("BT,TPD->BPD", weights, self.bank["prompt"].float()).to(embeddings.dtype)
        seen = attention_mask.new_ones(prompt.shape[:2])
        inputs = {
            "inputs_embeds": torch.cat([prompt, embeddings], dim=1),
            "attention_mask": torch.cat([seen, attention_mask], dim=1),
        }
        return inputs, prompt.shape[1]

    @contextlib.contextmanager
    def _mixing(self, weights):
        self._weights = weights
        try:
            yield
        finally:
            self._weights = None

    def _make_hook(self, block, layer):
        def add_mixture(linear, inputs, output):
            if self._weights is None:
                return output
            x = inputs[0]
            a, b = (self.bank[f"{block}_{leaf}"][layer].to(x) for leaf in "ab")
            columns = self._weights.repeat_interleave(a.shape[-1], dim=1) * self.config.scale
            # Beams are rows of their own.
            columns = columns.to(x).repeat_interleave(len(x) // len(columns), dim=0)
            return output + (x @ a.flatten(1) * columns[:, None]) @ b.flatten(0, 1)

        return add_mixture


def _check(config, tensors):
    """Refuses a config.json that does not go with the tensors, by the name of the field."""
    blocks = len(tensors["enabled"]) if "enabled" in tensors else 0
    lora = {name[len("bank.") : -len("_a")] for name in tensors if name.startswith("bank.") and name.endswith("_a")}
    wanted = {
        "kind": (config.kind in ("lora", "prompt"), 'must be "lora" or "prompt"'),
        "selection": (config.selection in ("attention", "mean", "sum"), 'must be "attention", "mean" or "sum"'),
        "temperature": (_is_positive(config.temperature), "must be a positive number"),
        "scale": (_is_positive(config.scale), "must be a positive number"),
        "tasks": (
            isinstance(config.tasks, (list, tuple)) and 0 < len(config.tasks) == blocks,
            f"must name a task for each of the {blocks} blocks of model.safetensors",
        ),
        "modules": (
            isinstance(config.modules, dict)
            and set(config.modules) == (lora if config.kind == "lora" else set())
            and all(isinstance(module, str) for module in config.modules.values()),
            f"must say what the blocks {', '.join(sorted(lora)) or 'none'} of model.safetensors adapt",
        ),
    }
    for field, (right, rule) in wanted.items():
        if not right:
            raise ValueError(f"config.json: {field}={getattr(config, field)!r} {rule}")
    if config.selection == "attention" and tuple(tensors["keys"].shape[:1] if "keys" in tensors else ()) != (blocks,):
        raise ValueError(f'config.json: selection="attention" needs a key for each of the {blocks} blocks')


def _is_positive(value):
    return type(value) in (int, float) and 0 < value < float("inf")


def _frozen(tensors):
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
