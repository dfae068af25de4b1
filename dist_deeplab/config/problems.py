"""What pydantic finds wrong with values, in the words of those who write them on a command line or in YAML."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dist_deeplab.redaction import redact

_WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number, in digits",
    "int_type": "must be a whole number",
    "missing": "a value is missing",
    "model_type": "must be a section of keys",
    "string_type": "must be a text",
    "too_long": "must have at most {max_length} values, not {actual_length}",
    "tuple_type": "must be a list, e.g. [0.5, 1.0]",
}
"""By pydantic's type of an error, with its context; what is not here pydantic says well itself."""


def sentence(error: ValidationError) -> str:
    """All that is wrong, each as `section.key = value: what it must be`."""
    said: dict[str, list[str]] = {}
    problems = [(_place(problem["loc"]), problem) for problem in error.errors()]
    for place, problem in problems:
        if any(other.startswith(f"{place}.") for other, _ in problems):
            continue  # of several types one fits but for a value inside it: that is the one that was meant
        place += f" = {_shown(problem['input'])}: " if place else ""
        said.setdefault(place, []).append(_words(problem["type"], problem["msg"], problem.get("ctx", {})))
    # A place named twice is one of several types: any of them would do.
    return "; ".join(
        place + " or ".join([words[0], *(other.removeprefix("must be ") for other in words[1:])])
        for place, words in said.items()
    )


def _words(kind: str, message: str, context: Mapping[str, Any]) -> str:
    if kind in _WORDS:
        return _WORDS[kind].format(**context)
    return re.sub("^Input should be", "must be", message.removeprefix("Value error, "))


def _place(location: Sequence[Any]) -> str:
    """`section.key`, with the number of a value in a list; what pydantic calls one of several types is left."""
    return ".".join(str(part) for n, part in enumerate(location) if n < 2 or isinstance(part, int))


def _shown(value: Any) -> str:
    return repr(redact(value) if isinstance(value, str) else value)
