"""A grid of runs: `optim.power=0.8,0.9,1.0 optim.lr=1e-3,2e-3` means six, every value of one with every of the other.

Only commas outside brackets and quotes separate values: `multi_scale.scales=[1.0,0.5]` is one value, and
`multi_scale.scales=[],[1.0,0.5]` are two.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dist_deeplab.config.keys import AFFECTS
from dist_deeplab.errors import UserError

_OPENING, _CLOSING = "[{", "]}"
_MAX_RUNS = 1000
_MAX_LENGTH = 60  # of a value in a name: a folder has at most 255 bytes


@dataclass(frozen=True)
class GridRun:
    """One point of a grid: a name that holds its values, and the overrides that set them."""

    suffix: str
    overrides: tuple[str, ...]


def split_values(text: str) -> list[str]:
    """Values between the commas that are outside brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (depth or not values[-1].strip()):  # within a word it is a letter
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return values


def expand(arguments: Sequence[str]) -> tuple[list[str], list[GridRun]]:
    """The overrides that are the same in all runs, and the runs in order, the last key changing fastest.

    Raises:
        UserError: no key has several values; one has a value twice; one must not differ between the runs of a sweep.
    """
    fixed: list[str] = []
    axes: list[tuple[str, list[str]]] = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        values = [value.strip() for value in split_values(text)]
        if len(values) == 1:
            fixed.append(argument)
            continue
        if key in AFFECTS and AFFECTS[key].what == "nothing":
            raise UserError(f"{argument!r}: {key} cannot be part of a grid; each run gets a name of its values")
        repeated = {value for value in values if values.count(value) > 1}
        if repeated:
            raise UserError(f"{argument!r} has the value {repeated.pop()!r} twice; give each once")
        if key in [known for known, _ in axes]:
            raise UserError(f"{key} is given twice; put all its values into one argument")
        axes.append((key, values))
    if not axes:
        raise UserError("no grid: give a key several values, e.g. optim.power=0.8,0.9,1.0")
    leaves = [key.rpartition(".")[2] for key, _ in axes]
    names = [leaf if leaves.count(leaf) == 1 else key for leaf, (key, _) in zip(leaves, axes)]
    runs = [
        GridRun(
            "-".join(f"{name}_{_as_name(value)}" for name, value in zip(names, point)),
            tuple(f"{key}={value}" for (key, _), value in zip(axes, point)),
        )
        for point in itertools.product(*(values for _, values in axes))
    ]
    if len(runs) > _MAX_RUNS:
        raise UserError(f"the grid has {len(runs)} runs, more than {_MAX_RUNS}; take fewer values")
    return fixed, _with_distinct_names(runs)


def _as_name(value: str) -> str:
    """The value in characters that a run's name may have: `[1.0, 0.5]` becomes 1.0_0.5, an empty value `none`.

    Long values such as paths are cut to their end. `.5` becomes 0.5: without the dot the name would say another value.
    """
    value = re.sub(r"(?<!\w)\.(?=\d)", "0.", value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", value)[-_MAX_LENGTH:].lstrip("_.").rstrip("_.-") or "none"


def _with_distinct_names(runs: list[GridRun]) -> list[GridRun]:
    """The runs, numbered where different values look the same in a name."""
    suffixes = [run.suffix for run in runs]
    numbers = [suffixes[: i + 1].count(suffix) for i, suffix in enumerate(suffixes)]
    return [
        run if suffixes.count(run.suffix) == 1 else GridRun(f"{run.suffix}-{number}", run.overrides)
        for run, number in zip(runs, numbers)
    ]
