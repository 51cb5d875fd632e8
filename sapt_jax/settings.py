"""What one setting is: its default, the values it takes, and where it matters. `config` lists those of a run."""

import dataclasses
import math
import sys
from typing import Any

# Whole numbers reach the device in 32 bits.
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, themselves no part of it where `above` and `below` say so; no NaN, no infinity."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        inside = self.low <= value <= self.high and abs(value) <= sys.float_info.max
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"{'more than' if self.above else 'from'} {self.low} to {'less than ' * self.below}{self.high}"
        if math.isinf(self.low):
            return "a finite number"
        if self.low:
            return f"at least {self.low}"
        return "positive" if self.above else "not negative"


POSITIVE, NOT_NEGATIVE, FINITE = Range(0, above=True), Range(0), Range()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the config.

    Attributes:
      default: its value where a config says nothing.
      text: what it is, in a sentence.
      must_be: the range of a number.
      choices: the values that it takes, or () for any.
      of_type: of its values; None is that of the default. A setting whose default is None may stay so.
      free: it may differ between two starts of one run: where things lie, how often it reports, how it computes.
      protocol: a score depends on it beside model and training, and it is told with every score.
    """

    default: Any
    text: str
    must_be: Range | None = None
    choices: tuple[str, ...] = ()
    of_type: type | None = None
    free: bool = False
    protocol: bool = False

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value of the setting `name`, as a sentence, or None."""
        if value is None and self.default is None:
            return None
        wanted = self.of_type or type(self.default)
        accepted = (float, int) if wanted is float else (tuple, list) if wanted is tuple else (wanted,)
        given = f"config.{name}={shown(value)}"
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            return f"{given} must be of type {wanted.__name__}."
        if self.choices and value not in self.choices:
            return f"{given} is unknown; choose one of {', '.join(filter(None, self.choices))}."
        if self.must_be is not None and value not in self.must_be:
            return f"{given} must be {self.must_be}."
        if wanted is int and value > _LARGEST and not (self.must_be and math.isfinite(self.must_be.high)):
            return f"{given} must be at most {_LARGEST}."
        return None


def shown(value: Any) -> str:
    """A value as a message of one line has it."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def setting(default: Any, text: str, must_be: Range | None = None, **fields: Any) -> Any:
    """A field of a method's dataclass that the config sets as config.METHOD.FIELD; arguments as of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default, text, must_be, **fields)})


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings among a dataclass's fields, by name."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(kind) if "setting" in field.metadata}
