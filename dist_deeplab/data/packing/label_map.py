"""Label maps: which grey levels or colours of a mask are which class, as people and annotation tools write it down."""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_deeplab.data.decode import DecodeError
from dist_deeplab.data.packing.text_files import read_lines
from dist_deeplab.data.shards.manifest import ShardError

VOID_NAMES = ("void", "ignore", "__ignore__", "unlabeled", "unlabelled")
_MAX_LEVEL = 2**31 - 1
_LEVEL = "([0-9]{1,10})"
_MAX_SHOWN = 8  # of the values of a mask that are not in the map
_UNKNOWN = -1
_PIXELS_AT_ONCE = 2**22


@dataclass(frozen=True)
class LabelMap:
    """Grey levels `(v,)` or colours `(r, g, b)` -> class index or void."""

    path: Path
    labels: dict[tuple[int, ...], int]

    @property
    def of_colours(self) -> bool:
        """Whether the map is of colours."""
        return len(next(iter(self.labels))) == 3

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """int16: label, or -1, of every level up to the largest, or of every colour (32 MiB)."""
        size = 2**24 if self.of_colours else min(max(key[0] for key in self.labels), 65535) + 1
        table = np.full(size, _UNKNOWN, dtype=np.int16)
        for key, label in self.labels.items():
            if _packed(key) < size:
                table[_packed(key)] = label
        return table

    def apply(self, values: np.ndarray) -> np.ndarray:
        """The class indices, uint8 [H, W], of a mask of levels, integers [H, W], or colours, uint8 [H, W, 3].

        Raises:
            DecodeError: it holds a level or colour that the map does not name.
        """
        if values.dtype == bool and (1,) not in self.labels and (255,) in self.labels:
            values = values.astype(np.uint8) * 255  # a bilevel file: viewers show 0 and 255
        label = np.empty(values.shape[:2], dtype=np.uint8)
        unknown: set[int] = set()
        # A part at a time: the integers are 8 bytes wide.
        rows = max(1, _PIXELS_AT_ONCE // max(1, values.size // max(1, len(values))))
        for top in range(0, len(label), rows):
            part = values[top : top + rows].astype(np.int64)
            if self.of_colours:
                part = (part[..., 0] << 16) | (part[..., 1] << 8) | part[..., 2]
            inside = (part >= 0) & (part < len(self._table))
            found = np.where(inside, self._table[np.where(inside, part, 0)], _UNKNOWN)
            if (found == _UNKNOWN).any():
                found = self._look_up(part, found)
                unknown |= set(np.unique(part[found == _UNKNOWN]).tolist())
            label[top : top + rows] = found
        if unknown:
            shown = ", ".join(self._show(value) for value in sorted(unknown)[:_MAX_SHOWN])
            raise DecodeError(f"the mask holds {shown}, which {self.path} does not name; add it there (or as `void`)")
        return label

    def _look_up(self, part: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Labels of levels above those in the table."""
        for key, label in self.labels.items():
            if _packed(key) >= len(self._table):
                found = np.where(part == _packed(key), label, found)
        return found

    def _show(self, value: int) -> str:
        if not self.of_colours:
            return f"the level {value}"
        return f"the colour {value >> 16} {value >> 8 & 255} {value & 255}"


def _packed(key: tuple[int, ...]) -> int:
    """A level, or a colour as 24 bits."""
    return functools.reduce(lambda packed, level: packed << 8 | level, key)


class _Entry(NamedTuple):
    """A line of a label map file: its place for messages, levels, and the class's name."""

    where: str
    levels: tuple[int, ...]
    name: str


def read_label_map(
    path: Path, *, class_names: Sequence[str] | None, ignore_label: int
) -> tuple[LabelMap, tuple[str, ...]]:
    """The map in a file, and the class names.

    Lines are `R G B name` or `LEVEL name`; CVAT's labelmap.txt (`name:R,G,B:parts:actions`) and Roboflow's _classes.csv
    (`LEVEL, name` under a header) are read too. Without `class_names` the names are numbered in the order in which they
    come first. Several colours may have one name; `void` (or ignore, unlabeled) is the void label.

    Raises:
        ShardError: no such file, a line that is none of these, a colour named twice, a name that is not in
            `class_names`; a class would get the index of void.
    """
    labels: dict[tuple[int, ...], int] = {}
    names = list(class_names or [])
    for where, levels, name in _entries(path):
        if levels in labels:
            raise ShardError(f"{where} names {' '.join(map(str, levels))} a second time")
        if name.lower() in VOID_NAMES and name not in names:
            labels[levels] = ignore_label
            continue
        if name not in names:
            if class_names is not None:
                raise ShardError(f"{where} names the class {name!r}, which the class names do not hold")
            names.append(name)
        labels[levels] = names.index(name)
    if class_names is None and ignore_label < len(names):
        raise ShardError(
            f"--ignore-label {ignore_label} is the index of the class {names[ignore_label]!r} of {path}, whose pixels "
            "would be void; take another (255), and call what is void `void`"
        )
    if len(set(labels.values()) - {ignore_label}) < 2:
        raise ShardError(f"{path} names fewer than two classes; write one `R G B name` or `LEVEL name` per line")
    return LabelMap(path, labels), tuple(names)


def _entries(path: Path) -> Iterator[_Entry]:
    length = 0  # of the first line's levels
    for number, line in enumerate(read_lines(path), start=1):
        if not line or line.startswith("#") or (number == 1 and re.match(r"pixel value\s*,", line.lower())):
            continue
        where = f"line {number} of {path}"
        parsed = _parse(line)
        if parsed is None or length not in (0, len(parsed[0])):
            raise ShardError(f"{where} is not `R G B name` (or, in all lines, `LEVEL name`): {line!r}")
        length = len(parsed[0])
        yield _Entry(where, *parsed)


def _parse(line: str) -> tuple[tuple[int, ...], str] | None:
    """The levels and the name of a line; None where it has neither form."""
    found = re.fullmatch(rf"{_LEVEL}(?:[\s,]+{_LEVEL}[\s,]+{_LEVEL})?[\s,:]+([^0-9].*)", line)
    if found:
        levels, name = tuple(int(text) for text in found.groups()[:3] if text), found.group(4).strip()
    else:
        cvat = re.fullmatch(rf"(.+?):{_LEVEL},{_LEVEL},{_LEVEL}(?::[^:]*)?(?::[^:]*)?", line)
        if cvat is None:
            return None
        levels, name = tuple(int(text) for text in cvat.groups()[1:]), cvat.group(1).strip()
    return None if max(levels) > (255 if len(levels) == 3 else _MAX_LEVEL) else (levels, name)
