"""From what is asked to token ids, in the template that the run was trained with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sapt_jax.data.benchmarks import BENCHMARKS
from sapt_jax.data.instructions import Instruction
from sapt_jax.data.prompts import EncodingRules, encode_chat, encode_prompt, make_prompt
from sapt_jax.data.sources.own_tasks import read_turns, written_out
from sapt_jax.pretrained.tokenizer import Tokenizer

# A text, or a chat as a list of {"role": str, "content": str}.
Asked = str | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Question:
    """One input.

    Attributes:
      asked: a text, or the turns of a chat.
      task: whose instruction goes before it; a method that is told the task of an input is told this one.
      definition: an instruction in place of the task's; "" is none, None is the task's where one is named.
    """

    asked: Asked
    task: str | None = None
    definition: str | None = None


class Encoded(NamedTuple):
    """A question as token ids [L] int32 with special tokens, and whether its middle was cut to the run's limit."""

    ids: np.ndarray
    cut: bool


@dataclasses.dataclass(frozen=True)
class Form:
    """How questions are put.

    Attributes:
      tokenizer, rules: of the run.
      instructions: of its tasks, by name.
      template: of a question without a task.
    """

    tokenizer: Tokenizer
    rules: EncodingRules
    instructions: Mapping[str, Instruction]
    template: str

    def encode(self, question: Question) -> Encoded:
        """The ids of a question.

        Raises:
          ValueError: its text is empty, its chat is none, or its task's instruction is not known.
        """
        asked, instruction = question.asked, self._instruction(question)
        turns = () if isinstance(asked, str) else _turns(asked)
        text = asked if isinstance(asked, str) else written_out(turns)
        if not text.strip():
            raise ValueError("the input is empty")
        # A lone surrogate, which JSON can spell, is no text.
        for name, given in (("input", text), ("definition", instruction.definition)):
            if not given.isascii():
                _check_unicode(name, given)
        if turns and self.tokenizer.has_chat_template:
            ids, cut = encode_chat(instruction.definition, turns, self.tokenizer, self.rules)
        else:
            prompt = make_prompt(instruction.template, instruction.definition, text)
            ids, cut = encode_prompt(prompt, self.tokenizer, self.rules)
        return Encoded(np.asarray(ids, np.int32), cut)

    def _instruction(self, question: Question) -> Instruction:
        known = self.instructions.get(question.task) if question.task is not None else Instruction("", self.template)
        if question.definition is not None:
            return Instruction(question.definition, known.template if known else self.template)
        if known is None:
            has = ", ".join(self.instructions) or "none"
            raise ValueError(
                f"the run does not know the instruction of task {question.task!r} (it has {has}): give a definition, "
                '"" for none'
            )
        return known


def default_template(config: ConfigDict) -> str:
    """The template of the run's benchmark, where it has one for all tasks."""
    return BENCHMARKS[config.benchmark].prompt or "plain"


def _turns(asked: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(asked, list | tuple) or not asked:
        raise ValueError(f"the input must be a text or a list of chat messages, not {asked!r:.60}")
    try:
        return read_turns(asked)
    except ValueError:
        raise ValueError(
            'the messages of a chat must be {"role": ..., "content": a text or a list of {"type": "text", "text": ...}}'
        ) from None


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is not Unicode text: character {error.start} is half of a pair") from None
