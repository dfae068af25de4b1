"""Which labels are classes, and how masks of all kinds become class indices before they are packed.

A mask is an image of class indices (greyscale or palette) or, with a label map, of any grey levels or colours that the
map gives names. What comes out is always uint8 [H, W] of class indices and void.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_deeplab.data.decode import DecodeError, decode_label
from dist_deeplab.data.shards.manifest import ShardError

_MAX_CLASSES = 255  # 8 bits less the void label
_VOID_NAMES = ("void", "ignore", "unlabeled", "unlabelled")
_MAX_SHOWN = 8  # of the unexpected values of a mask
_LOSSY = ("JPEG", "MPO", "WEBP")


@dataclass(frozen=True)
class LabelSpace:
    """What a label pixel may be: a class index under `len(class_names)`, or `ignore_label`."""

    class_names: tuple[str, ...]
    ignore_label: int

    def __post_init__(self) -> None:
        if len(self.class_names) > _MAX_CLASSES:
            raise ShardError(
                f"{len(self.class_names)} classes don't fit into an 8-bit label; {_MAX_CLASSES} do, and void"
            )

    def count(self, label: np.ndarray, *, where: str) -> np.ndarray:
        """The pixels of each class, int64 [num_classes].

        Raises:
            ShardError: a pixel is neither a class nor void.
        """
        histogram = np.bincount(label.ravel(), minlength=256)
        unexpected = self.unexpected(histogram)
        if unexpected:
            raise ShardError(
                f"{where} holds the label {unexpected[0]}, but {self.describe()}; give all classes or fix the mask"
            )
        histogram[self.ignore_label] = 0
        return histogram[: len(self.class_names)].astype(np.int64)

    def unexpected(self, histogram: np.ndarray) -> list[int]:
        """The labels with pixels in `histogram`, int [256], that are neither a class nor void."""
        allowed = np.zeros(256, dtype=bool)
        allowed[: len(self.class_names)] = allowed[self.ignore_label] = True
        return [int(value) for value in np.flatnonzero((histogram > 0) & ~allowed)]

    def describe(self) -> str:
        """The allowed labels, as part of a sentence."""
        return f"classes are 0..{len(self.class_names) - 1} and void is {self.ignore_label}"


@dataclass(frozen=True)
class LabelMap:
    """Grey levels `(v,)` or colours `(r, g, b)` -> class index or void."""

    path: Path
    labels: dict[tuple[int, ...], int]

    @property
    def of_colours(self) -> bool:
        """Whether the map is of colours."""
        return len(next(iter(self.labels))) == 3

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The class indices, uint8 [H, W], of a mask uint8 [H, W] or [H, W, 3].

        Raises:
            DecodeError: it holds a level or colour that the map does not name.
        """
        packed = image.astype(np.int64)
        if self.of_colours:
            packed = (packed[..., 0] << 16) | (packed[..., 1] << 8) | packed[..., 2]
        values, inverse = np.unique(packed, return_inverse=True)
        known = {int(sum(c << 8 * (len(key) - 1 - i) for i, c in enumerate(key))): n for key, n in self.labels.items()}
        unexpected = [int(value) for value in values if int(value) not in known]
        if unexpected:
            shown = ", ".join(self._show(value) for value in unexpected[:_MAX_SHOWN])
            raise DecodeError(f"the mask holds {shown}, which {self.path} does not name; add it there (or as `void`)")
        table = np.array([known[int(value)] for value in values], dtype=np.uint8)
        return table[inverse.reshape(image.shape[:2])]

    def _show(self, value: int) -> str:
        if not self.of_colours:
            return f"the level {value}"
        return f"the colour {value >> 16} {value >> 8 & 255} {value & 255}"


def read_label_map(
    path: Path, *, class_names: Sequence[str] | None, ignore_label: int
) -> tuple[LabelMap, tuple[str, ...]]:
    """The map in a file of `R G B name` or `LEVEL name` lines, and the class names.

    Without `class_names` the names are numbered in the order in which they come first. Several colours may have one
    name; `void` (or ignore, unlabeled) is the void label.

    Raises:
        ShardError: no such file, a line that is neither, a colour named twice, a name that is not in `class_names`;
            a class would get the index of void.
    """
    labels: dict[tuple[int, ...], int] = {}
    names = list(class_names or [])
    for number, line in enumerate(read_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"(\d+)(?:[\s,]+(\d+)[\s,]+(\d+))?[\s,:]+(\D.*)", line)
        levels = tuple(int(text) for text in found.groups()[:3] if text) if found else ()
        if found is None or max(levels) > 255 or len({len(key) for key in labels} | {len(levels)}) > 1:
            raise ShardError(f"line {number} of {path} is not `R G B name` (or, in all lines, `LEVEL name`): {line!r}")
        name = found.group(4).strip()
        if levels in labels:
            raise ShardError(f"line {number} of {path} names {' '.join(map(str, levels))} a second time")
        if name.lower() in _VOID_NAMES and name not in names:
            labels[levels] = ignore_label
            continue
        if name not in names:
            if class_names is not None:
                raise ShardError(f"line {number} of {path} names the class {name!r}, which the class names do not hold")
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


def decode_mask(data: bytes, label_map: LabelMap | None) -> np.ndarray:
    """The class indices, uint8 [H, W], of a mask file of any lossless kind.

    Raises:
        DecodeError: damaged, lossy, or, without a map, in colour or of 16 bits.
    """
    if label_map is None and data.startswith(b"\x89PNG"):
        return decode_label(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            form, mode = image.format, image.mode
            if label_map is not None and label_map.of_colours:
                pixels = np.asarray(image.convert("RGB"))
            elif mode in ("L", "P", "1"):
                pixels = np.asarray(image, dtype=np.uint8)  # P: the indices
            else:
                pixels = None
    except Exception:  # decoders of damaged files raise nearly anything, e.g. DecompressionBombError
        raise DecodeError("the mask is damaged or not an image") from None
    if form in _LOSSY:
        raise DecodeError(f"the mask is a {form}, which does not keep class indices; export it as PNG")
    if pixels is None:
        kind = "in colour" if mode in ("RGB", "RGBA", "CMYK") else f"of mode {mode}"
        raise DecodeError(f"the mask is {kind}, not 8-bit class indices; name its colours in a --label-map")
    return pixels if label_map is None else label_map.apply(pixels)


def colours_in(data: bytes, *, most: int) -> list[tuple[int, ...]]:
    """Up to `most` colours of an image, most frequent first: to tell a user what a label map should name."""
    with Image.open(io.BytesIO(data)) as image:
        counted: list[tuple[int, Any]] = image.convert("RGB").getcolors(maxcolors=2**24) or []
    return [colour for _, colour in sorted(counted, reverse=True)[:most]]


def read_class_names(path: Path) -> tuple[str, ...]:
    """The non-blank lines of a file.

    Raises:
        ShardError: no such file, not text, fewer than 2 or more than 255 names, or one twice.
    """
    if not path.is_file():
        raise ShardError(f"there is no file of class names at {path}; write one name per line, background first")
    names = tuple(line for line in read_lines(path) if line)
    if not 2 <= len(names) <= _MAX_CLASSES or len(set(names)) != len(names):
        raise ShardError(f"{path} must name 2 to 255 classes, each once, background first; it has {len(names)}")
    return names


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without the white space around them; CRLF and a byte order mark are tolerated.

    Raises:
        ShardError: there is no such file, or it is not UTF-8 text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ShardError(f"{path} is not UTF-8 text; convert it, e.g. with iconv") from None
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from None
