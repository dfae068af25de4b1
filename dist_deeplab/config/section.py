"""What a section of the configuration is, and the kinds of values that keys share."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from dist_deeplab.redaction import shown_url


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
RECIPE_EVERYWHERE = Affects("recipe", inference=True)
SCORE = Affects("score", inference=True)
ORIGIN = Affects("origin")
EXECUTION = Affects("execution")
EXECUTION_EVERYWHERE = Affects("execution", inference=True)
NOTHING = Affects("nothing")

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A string; `key=` on the command line and `key:` in YAML mean the empty one."""


class Location:
    """A path or URL in the configuration, which shows itself without what may be secret in a URL.

    Printed, formatted and dumped it is the shown form, without user part and query; only `real` opens it. It is not a
    `str` on purpose: whoever forgets `real` gets a TypeError, not a leak.
    """

    __slots__ = ("real",)

    def __init__(self, real: str = "") -> None:
        self.real = real

    def __str__(self) -> str:
        return shown_url(self.real)

    def __repr__(self) -> str:
        return repr(str(self))

    def __bool__(self) -> bool:
        return bool(self.real)

    def __eq__(self, other: object) -> bool:
        return self.real == (other.real if isinstance(other, Location) else other)

    def __hash__(self) -> int:
        return hash(self.real)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Taken from a text, a number (coerced) or nothing (the empty one); dumped as the shown form."""
        text = core_schema.no_info_before_validator_function(
            lambda value: "" if value is None else value.real if isinstance(value, cls) else value,
            core_schema.str_schema(coerce_numbers_to_str=True),
        )
        return core_schema.no_info_after_validator_function(
            cls, text, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


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
