"""What one setting is: its default, the values it takes, and where it matters. `config` lists those of a run."""

import dataclasses
from typing import Any

POSITIVE, NOT_NEGATIVE = "positive", "not negative"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the config.

    Attributes:
      default: its value where a config says nothing.
      text: what it is, in a sentence.
      must_be: POSITIVE, NOT_NEGATIVE, or "" for any value of its type.
      choices: the values that it takes, or () for any.
      of_type: of its values; None is that of the default. A setting whose default is None may stay so.
      free: it may differ between two starts of one run: where things lie, how often it reports, how it computes.
      protocol: a score depends on it beside model and training, and it is told with every score.
    """

    default: Any
    text: str
    must_be: str = ""
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
        if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
            return f"config.{name}={value!r} must be of type {wanted.__name__}."
        if self.choices and value not in self.choices:
            return f"config.{name}={value!r} is unknown; choose one of {', '.join(self.choices)}."
        if (self.must_be == POSITIVE and not value > 0) or (self.must_be == NOT_NEGATIVE and not value >= 0):
            return f"config.{name}={value} must be {self.must_be}."
        return None


def setting(default: Any, text: str, must_be: str = "", **fields: Any) -> Any:
    """A field of a method's dataclass that the config sets as config.METHOD.FIELD; arguments as of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default, text, must_be, **fields)})


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings among a dataclass's fields, by name."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(kind) if "setting" in field.metadata}
