"""What a section of the configuration is, and the kinds of values that keys share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

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
