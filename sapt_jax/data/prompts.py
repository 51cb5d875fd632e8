"""Prompt templates of the paper's protocol, and the step from text to token ids with its truncation.

A prompt is three pieces, so that truncation can keep the definition and the closing "Output: " and cut the
input.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from sapt_jax.data.task import Instance

FAMILIES = ("decoder_only", "encoder_decoder")

# A model that writes a task's rows answers the cue with `{definition}__inp__{input}`, and `__ans__{output}` after it
# where answers are wanted (SAPT, section 3.3, in the format of its released code).
CUE = "__gen__"
INPUT_MARK = "__inp__"
ANSWER_MARK = "__ans__"


class Prompt(NamedTuple):
    """The text of a prompt is `head + input + tail`."""

    head: str
    input: str
    tail: str


class Tokenizer(Protocol):
    """What this module asks of a tokenizer; `pretrained.tokenizer.Tokenizer` says what each is."""

    eos_id: int
    bos_id: int | None
    has_chat_template: bool

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, turns: Sequence[tuple[str, str]]) -> list[int]: ...


def _superni(definition: str, text: str) -> Prompt:
    stated = f"Definition: {definition.strip()}\n\n" if definition.strip() else ""
    return Prompt(f"{stated}Now complete the following example -\nInput: ", text, "\nOutput: ")


def _long_sequence(definition: str, text: str) -> Prompt:
    return Prompt(f"{definition.strip()}\n" if definition.strip() else "", text, "\nOutput: ")


def _plain(definition: str, text: str) -> Prompt:
    return Prompt(f"{definition.strip()}\n\n" if definition.strip() else "", text, "\nOutput: ")


TEMPLATES: dict[str, Callable[[str, str], Prompt]] = {
    "superni": _superni,
    "long_sequence": _long_sequence,
    "plain": _plain,
}


def make_prompt(template: str, definition: str, text: str) -> Prompt:
    """Fills a template of `TEMPLATES`; the definition is stripped, the input is taken verbatim."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown prompt template {template!r}; there are {', '.join(TEMPLATES)}.")
    return TEMPLATES[template](definition, text)


def write_sample(definition: str, instance: Instance, answers: bool) -> str:
    """The text that a writer learns for an instance."""
    answer = f"{ANSWER_MARK}{instance.outputs[0]}" if answers else ""
    return f"{definition.strip()}{INPUT_MARK}{instance.input}{answer}"


class Writing(NamedTuple):
    """How rows become texts to write: what asks for them, whether they have answers, and their most tokens."""

    cue: str
    answers: bool
    max_length: int


@dataclasses.dataclass(frozen=True)
class EncodingRules:
    """How text becomes token ids; the same for every task of a run.

    family: "decoder_only" (beginning token first if `add_bos`) or "encoder_decoder" (end token last).
    max_source_length, max_target_length: in tokens, special tokens included.
    truncation: "middle" cuts the middle of the input; "end" cuts the end of the prompt, "Output: " with it,
      as the paper's code does.
    target_keeps_end: an answer that is too long is cut before its end token; False cuts the end token too
      (the paper's code for LLaMA).
    references: which reference of several is trained on: "first", or "random", one draw for each instance,
      the same in every epoch (the paper's code).
    seed: of "random" references.
    on_long_target: "cut" cuts and counts answers over the limit, "error" raises.
    writing: how rows become texts to write as well, or None where none are written.
    """

    family: str
    add_bos: bool
    max_source_length: int
    max_target_length: int
    truncation: str
    target_keeps_end: bool
    references: str
    seed: int
    on_long_target: str
    writing: Writing | None = None

    def __post_init__(self):
        choices = {
            "family": FAMILIES,
            "truncation": ("middle", "end"),
            "references": ("first", "random"),
            "on_long_target": ("cut", "error"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"config.data.{field}={getattr(self, field)!r} must be one of {', '.join(allowed)}.")
        for field in ("max_source_length", "max_target_length"):
            if getattr(self, field) < 2:
                raise ValueError(f"config.data.{field}={getattr(self, field)} must be at least 2.")


def _cut_middle(ids: list[int], head: int, tail: int, length: int) -> list[int]:
    """Keeps `length` of `ids`: at least the first `head` and last `tail`, and the rest of the room half and half."""
    if tail > length:
        raise ValueError(
            f"config.data.max_source_length leaves {length} tokens, fewer than the {tail} of the prompt's last "
            "line. Raise it."
        )
    # A definition longer than the whole limit loses its end: the line that asks for the answer must stay.
    room = max(0, length - head - tail)
    first = min(head, length - tail) + (room + 1) // 2
    return ids[:first] + ids[len(ids) - (length - first) :]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, rules: EncodingRules) -> tuple[list[int], bool]:
    """Returns (token ids with special tokens, at most `max_source_length`; whether the prompt was cut)."""
    # The prompt is tokenised as one text, and cut as ids, so that what stays has the same ids as in the whole
    # prompt.
    ids = tokenizer.encode("".join(prompt))
    return _finish(ids, (prompt.head, prompt.tail), tokenizer, rules)


def encode_chat(
    definition: str, turns: Sequence[tuple[str, str]], tokenizer: Tokenizer, rules: EncodingRules
) -> tuple[list[int], bool]:
    """As `encode_prompt`, of a chat in the tokenizer's own template; the definition begins the user's first turn.

    Too long a chat loses its middle, so its beginning and the template's last line stay.

    Raises:
      ValueError: from `Tokenizer.encode_chat`.
    """
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), 0)
    stated = [
        (role, f"{definition.strip()}\n\n{content}") if place == first and definition.strip() else (role, content)
        for place, (role, content) in enumerate(turns)
    ]
    ids = tokenizer.encode_chat(stated)
    # Many templates write the beginning token themselves.
    if ids[:1] == [tokenizer.bos_id] and rules.family == "decoder_only" and rules.add_bos:
        ids = ids[1:]
    return _finish(ids, ("", ""), tokenizer, rules)


def _finish(
    ids: list[int], kept: tuple[str, str], tokenizer: Tokenizer, rules: EncodingRules
) -> tuple[list[int], bool]:
    """Cuts the ids of a prompt to the limit, special tokens around them; what spells `kept` at its ends goes last."""
    before = [tokenizer.bos_id] if rules.family == "decoder_only" and rules.add_bos else []
    after = [tokenizer.eos_id] if rules.family == "encoder_decoder" else []
    if None in before:
        raise ValueError(
            "config.data.add_bos is set, but the tokenizer has no beginning token: set config.data.add_bos to False."
        )
    length = rules.max_source_length - len(before) - len(after)
    cut = len(ids) > length
    if cut and rules.truncation == "end":
        ids = ids[:length]
    elif cut:
        head, tail = (len(tokenizer.encode(text)) for text in kept)
        ids = _cut_middle(ids, head, tail, length)
    return before + ids + after, cut


def encode_answer(answer: str, tokenizer: Tokenizer, rules: EncodingRules) -> tuple[list[int], bool]:
    """Returns (token ids and the end token, at most `max_target_length`; whether the answer was cut)."""
    ids = tokenizer.encode(answer)
    limit = rules.max_target_length
    if len(ids) + 1 <= limit:
        return ids + [tokenizer.eos_id], False
    if rules.on_long_target == "error":
        raise ValueError(
            f"an answer of {len(ids) + 1} tokens (end token included) is over config.data.max_target_length={limit}: "
            f'{answer!r:.80}. Raise the limit or set config.data.on_long_target="cut".'
        )
    return (ids[: limit - 1] + [tokenizer.eos_id] if rules.target_keeps_end else ids[:limit]), True


def choose_reference(instance: Instance, references: str, seed: int) -> str:
    """Returns the answer to train on: the first, or one drawn by (seed, instance id)."""
    if references == "first" or len(instance.outputs) == 1:
        return instance.outputs[0]
    rng = np.random.default_rng([seed, zlib.crc32(instance.id.encode())])
    return instance.outputs[rng.integers(len(instance.outputs))]
