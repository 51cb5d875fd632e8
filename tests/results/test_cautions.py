"""What is told of a task before it is trained."""

import dataclasses

from sapt_jax.data.encoding import encode_split
from sapt_jax.data.prompts import EncodingRules
from sapt_jax.data.stream import EncodedTask
from sapt_jax.data.task import Instance, Task
from sapt_jax.results.cautions import cautions

RULES = EncodingRules("encoder_decoder", False, 20, 20, "middle", True, "first", 0, "cut")


class Letters:
    """An id for each letter a to z and a space, and 2 for any other character."""

    eos_id, bos_id, unk_id, has_chat_template = 1, None, 2, False

    def encode(self, text):
        return ["abcdefghijklmnopqrstuvwxyz ".find(letter) + 4 if letter.islower() else 2 for letter in text]


def encoded(answers, inputs=None, **fields):
    inputs = inputs or ["a"] * len(answers)
    rows = tuple(
        Instance(str(n), text, (answer,)) for n, (text, answer) in enumerate(zip(inputs, answers, strict=True))
    )
    task = Task("mine", "", rows, (), rows[:1], **fields)
    split, tested = (
        encode_split(part, definition="", template="plain", tokenizer=Letters(), rules=dataclasses.replace(RULES))
        for part in (rows, rows[:1])
    )
    return EncodedTask(task, split, None, tested, None)


def told(*arguments, **fields):
    return cautions(encoded(*arguments, **fields), Letters())


def test_answers_that_become_the_same_ids():
    lines = told(["支持", "反对", "yes"])
    assert lines[0].startswith("mine: 4 of 4 inputs and 3 of 4 answers hold characters unknown to the tokenizer")
    assert lines[1:] == ["mine: the answers '支持' and '反对' are the same token ids: no model can tell them apart."]


def test_answers_that_count_as_one():
    (_, line) = told(["no", "no ", "c", "c+"], metric="exact_match_of_words")[:2]
    assert "'no' and 'no ' count as one under exact_match_of_words" in line
    assert not [line for line in told(["no", "yes"], metric="exact_match_of_words") if "one" in line or "same" in line]
    # Free text may come near to itself.
    assert not [line for line in told([*map(chr, range(200)), "c", "c+"]) if "one" in line or "same" in line]
    assert "'x' and 'x+' count as one" in "".join(told(["x"], labels=("x", "x+", "y")))
