"""What a section of the configuration is, and the kinds of values that keys share."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


@dataclass(frozen=True)
class Affects:
    """What the value of a key matters for; every key has one among its annotations.

    what:
        recipe: the weights that a run computes; a resumed run keeps it.
        score: what an image scores, given the weights.
        origin: data and weights to start from; compared by content or read at the start only, so a path may change.
        execution: speed, memory, or how often something happens, neither weights nor scores.
        nothing: how the run is called, where it is and where it is reported.
    inference: whether evaluation and prediction use it too, so that it can be given there.
    """

    what: Literal["recipe", "score", "origin", "execution", "nothing"]
    inference: bool = False


RECIPE = Affects("recipe")
SCORE = Affects("score", inference=True)
ORIGIN = Affects("origin")
EXECUTION = Affects("execution")
EXECUTION_EVERYWHERE = Affects("execution", inference=True)
NOTHING = Affects("nothing")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A string; `key=` on the command line and `key:` in YAML mean the empty one."""


class Section(BaseModel):
    """A frozen group of keys; the string under each key is its documentation (`--print-config` shows it)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if cls.model_fields[info.field_name or ""].annotation is not bool:
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(v, bool) for v in values):
                raise ValueError("must not be true or false (YAML reads yes, no, on and off as these too)")
        return value
