"""Any method on any other config, with what its authors use where that is not what the other config has.

python -m sapt_jax.main --config=configs/methods.py --workdir=runs/sequential
python -m sapt_jax.main --config=configs/methods.py:name=o_lora,of=demo --workdir=runs/demo/o_lora
python -m sapt_jax.main --config=configs/methods.py:name=l2p,of=t5_large_long,order=long_mnli --workdir=runs/l2p

What stands beside `name` and `of` goes to the other config. docs/methods.md lists the methods.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import paper
from sapt_jax.methods import METHODS

Changes = dict[str, Any]


def _is_t5(c: ConfigDict) -> bool:
    return "t5" in (c.model.path or c.model.variant)


def _at_most(c: ConfigDict, rows: int) -> Changes:
    """Batches of so many rows, or of the config's own where these are fewer."""
    return {"train.batch_size": min(c.train.batch_size, rows)}


def _as_it_is(c: ConfigDict) -> Changes:
    """LoRA methods are compared at SAPT's rates, epochs and ranks; what is their own is their default."""
    return {}


def _replay(c: ConfigDict) -> Changes:
    """Real rows where the other config has the authors' pools, which have no answers, or no rows at all."""
    return {"pseudo_samples.source": "train"} if c.pseudo_samples.source in ("files", "statistics") else {}


def _o_lora(c: ConfigDict) -> Changes:
    """Its release on Long Sequence (scripts/long.sh); it has none for SuperNI. LoRA's dropout of 0.1 is left out.

    On LLaMA-2 its first task has a rate of 1e-3, and the others this one.
    """
    if c.benchmark != "long_sequence":
        return {}
    if not _is_t5(c):
        return {"optimizer.learning_rate": 1e-4}
    once = {"train.epochs": 1, "train.eval_every_epochs": 1, "train.batch_size": 64, "pet.rank": 8}
    return {"optimizer.learning_rate": 1e-3, **once}


def _prog_prompt(c: ConfigDict) -> Changes:
    """T5: the release, rows of a batch as SABER has them on SuperNI. LLaMA-2: SABER's runs of it."""
    options = {"pet.kind": "prompt", "pet.prompt_length": 10, "optimizer.options": (("weight_decay", 1e-5),)}
    if not _is_t5(c):
        return {**options, "optimizer.learning_rate": 0.03, **_at_most(c, 16)}
    return {**options, "optimizer.learning_rate": 0.3, **_at_most(c, 8 if c.benchmark == "long_sequence" else 32)}


def _l2p(c: ConfigDict) -> Changes:
    """The release's rate and length of a prompt; no text model's settings are known."""
    return {"pet.kind": "prompt", "pet.prompt_length": 10, "optimizer.learning_rate": 0.03}


def _lfpt5(c: ConfigDict) -> Changes:
    """The release: a long prompt, Adafactor without the scale of what it trains, and rows that the prompt writes."""
    options = (("multiply_by_parameter_scale", False), ("weight_decay_rate", 1e-5))
    return {
        "pet.kind": "prompt",
        "pet.prompt_length": 300,
        "optimizer.name": "adafactor",
        "optimizer.options": options,
        "optimizer.learning_rate": 0.5,
        "pseudo_samples.source": "generate",
        "pseudo_samples.writer.answers": True,
        **_at_most(c, 8),
    }


PRESETS: Mapping[str, Callable[[ConfigDict], Changes]] = {
    "sapt": _as_it_is,
    "sequential": _as_it_is,
    "inc_lora": _as_it_is,
    "o_lora": _o_lora,
    "n_lora": _as_it_is,
    "ella": _as_it_is,
    "inf_lora": _as_it_is,
    "gain_lora": _as_it_is,
    "slao": _as_it_is,
    "ewc": _as_it_is,
    "epi": _as_it_is,
    "any_ssr": _as_it_is,
    "l2p": _l2p,
    "prog_prompt": _prog_prompt,
    "lfpt5": _lfpt5,
    "replay": _replay,
    "single_task": _as_it_is,
    "joint": _as_it_is,
}


def preset(c: ConfigDict, name: str) -> Changes:
    """What a method changes of another config, itself included."""
    # What the other config says of rates, it says of SAPT's selector.
    own = {"optimizer.rates": ((".*", 1.0),)} if name != "sapt" else {}
    return {"method": name, **own, **PRESETS[name](c)}


def get_config(argument: str = ""):
    """The config that an argument `name=METHOD,of=CONFIG` names; further parts are the other config's own argument."""
    parts = list(filter(None, argument.split(",")))
    own = [part for part in parts if part.partition("=")[0] in ("name", "of")]
    rest = ",".join(part for part in parts if part not in own)
    chosen = paper.parse_argument(",".join(own), name="sequential", of="t5_large_superni")
    name, of = chosen["name"], chosen["of"]
    if name not in METHODS:
        raise ValueError(f"the config's argument name={name!r} is unknown; choose {', '.join(METHODS)}.")
    try:
        other = importlib.import_module(f"configs.{of}").get_config
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"the config's argument of={of!r} is no config of the folder configs.") from None
    if rest and not inspect.signature(other).parameters:
        raise ValueError(f"the config's argument {rest!r} is not understood: configs/{of}.py takes none.")
    c = other(rest) if rest else other()
    c.update_from_flattened_dict(preset(c, name))
    return c
