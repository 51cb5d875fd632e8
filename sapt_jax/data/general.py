"""A text that no task is about, as passages whose second part a model is to foresee."""

import importlib
from pathlib import Path

from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.data.prompts import EncodingRules, Tokenizer
from sapt_jax.data.task import read_text

# Of config.eval.general: the text that comes with the demo's sources.
DEMO = "demo"


def load_general(name: str, data_dir: str, tokenizer: Tokenizer, rules: EncodingRules) -> EncodedSplit | None:
    """The passages of config.eval.general; None where it is "".

    Raises:
      FileNotFoundError or ValueError: no such file, not UTF-8, or shorter than one passage.
    """
    if not name:
        return None
    if name == DEMO:
        # Imported on use: the demo needs packages that nothing else needs.
        text = importlib.import_module("sapt_jax.data.sources.demo").load_demo_text(data_dir or None)
    elif Path(name).expanduser().is_file():
        text = read_text(Path(name).expanduser())
    else:
        raise FileNotFoundError(f'config.eval.general={name!r}: no such file. Name a text file, or "{DEMO}".')
    return cut_passages(text, tokenizer, rules)


def cut_passages(text: str, tokenizer: Tokenizer, rules: EncodingRules) -> EncodedSplit:
    """A text, passage after passage; its rest, shorter than one, is left out.

    A passage fills the longest source and the longest answer that the rules allow, with the source's special tokens. It
    depends on nothing else, so that a longer task order changes no passage.

    Raises:
      ValueError: it is shorter than one passage.
    """
    before = [tokenizer.bos_id] if rules.family == "decoder_only" and rules.add_bos else []
    after = [tokenizer.eos_id] if rules.family == "encoder_decoder" else []
    ids, room = tokenizer.encode(text), rules.max_source_length - len(before) - len(after)
    size = room + rules.max_target_length
    starts = range(0, len(ids) - size + 1, size)
    if not starts:
        raise ValueError(
            f"config.eval.general: a text of {len(ids)} tokens, but config.data.max_source_length and "
            f"max_target_length make passages of {size}. Take a longer text."
        )
    sources = Ragged.from_rows(before + ids[start : start + room] + after for start in starts)
    return EncodedSplit(sources, Ragged.from_rows(ids[start + room : start + size] for start in starts), 0, 0)
