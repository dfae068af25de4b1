"""Which labels are classes, and how masks of all kinds become class indices before they are packed.

A mask is an image of class indices (greyscale or palette) or, with a label map, of any grey levels or colours that the
map gives names. What comes out is always uint8 [H, W] of class indices and void.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_deeplab.data.decode import decode_values
from dist_deeplab.data.image_file import DEFAULT, DecodeError, DecodeOptions
from dist_deeplab.data.packing.label_map import VOID_NAMES, LabelMap
from dist_deeplab.data.packing.text_files import read_lines
from dist_deeplab.data.shards.manifest import ShardError

_MAX_CLASSES = 255  # 8 bits less the void label
_PIXELS_AT_ONCE = 2**22


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
        histogram = count_values(label)
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


def refuse_class_named_as_void(class_names: Sequence[str], ignore_label: int) -> None:
    """Check that no class has the index of void.

    Raises:
        ShardError: one has, so its pixels would be void, and perhaps all names belong to the label before theirs.
    """
    if ignore_label < len(class_names) and class_names[ignore_label].lower() not in VOID_NAMES:
        raise ShardError(
            f"--ignore-label {ignore_label} is the index of the class {class_names[ignore_label]!r}, whose pixels "
            f"would be void; if the names leave void out, write `void` as a name of its own before this one, else take "
            "another --ignore-label (255)"
        )


def count_values(label: np.ndarray) -> np.ndarray:
    """Pixels of each value of a label, int64 [256]; a part at a time, since numpy widens each pixel to 8 bytes."""
    flat = label.reshape(-1)
    parts = (flat[start : start + _PIXELS_AT_ONCE] for start in range(0, flat.size, _PIXELS_AT_ONCE))
    return sum((np.bincount(part, minlength=256) for part in parts), np.zeros(256, dtype=np.int64))


def require_two_classes(histogram: np.ndarray, labels: LabelSpace, *, where: str, remedy: str = "") -> None:
    """Check that void does not hold everything that is not one class, as in masks of 0 and 255.

    Args:
        histogram: int [256], pixels of each label.
        labels: what labels mean.
        where: names the masks in the message.
        remedy: a further way out, for the end of the sentence.

    Raises:
        ShardError: it does; a network would score 100 % by predicting that class everywhere.
    """
    void = labels.ignore_label
    found = [value for value in np.flatnonzero(histogram).tolist() if value != void]
    if not histogram[void] or len(found) > 1 or len(labels.class_names) < 2:
        return
    if not found:
        raise ShardError(f"{where} hold no label but void ({void}): there is nothing to learn or to score")
    name = labels.class_names[found[0]]
    other = next(name for value, name in enumerate(labels.class_names) if value not in (found[0], void))
    raise ShardError(
        f"{where} hold the labels {found[0]} ({name}) and {void} alone, and {void} is void: no pixel of another class "
        f"would be left; if {void} means {other}, give a --label-map FILE with the lines `{found[0]} {name}` and "
        f"`{void} {other}`, or write {labels.class_names.index(other)} instead of {void} into the masks{remedy}"
    )


def decode_mask(data: bytes, label_map: LabelMap | None, options: DecodeOptions = DEFAULT) -> np.ndarray:
    """The class indices, uint8 [H, W], of a mask file of any lossless kind.

    Raises:
        DecodeError: damaged, lossy, or, without a map, in colour or with a value above 255.
    """
    if label_map is not None:
        return label_map.apply(decode_values(data, colours=label_map.of_colours, options=options))
    values = decode_values(data, colours=False, options=options)
    if values.dtype not in (np.uint8, bool) and values.size and not 0 <= values.min() <= values.max() <= 255:
        value = values.min() if values.min() < 0 else values.max()
        raise DecodeError(f"the mask holds the value {value}, which is not an 8-bit label; name it in a --label-map")
    return values.astype(np.uint8, copy=False)


def colours_in(data: bytes, *, most: int) -> list[tuple[int, ...]]:
    """Up to `most` colours of a mask, most frequent first: to tell a user what a label map should name."""
    colours = decode_values(data, colours=True).reshape(-1, 3).astype(np.int32)
    packed, counts = np.unique(colours @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32), return_counts=True)
    frequent = packed[np.argsort(-counts, kind="stable")[:most]].tolist()
    return [(value >> 16, value >> 8 & 255, value & 255) for value in frequent]


def read_class_names(path: Path) -> tuple[str, ...]:
    """The non-blank lines of a file; of labelme's labels.txt without its first, `__ignore__`, whose label is void.

    Raises:
        ShardError: no such file, not text, fewer than 2 or more than 255 names, or one twice; a label map.
    """
    if not path.is_file():
        raise ShardError(f"there is no file of class names at {path}; write one name per line, background first")
    names = tuple(line for line in read_lines(path) if line)
    if names and names[0] == "__ignore__":
        names = names[1:]
    if names and all(line.startswith("#") or line.count(":") == 3 for line in names):
        raise ShardError(f"{path} is CVAT's label map of names and colours; give it as --label-map")
    if not 2 <= len(names) <= _MAX_CLASSES or len(set(names)) != len(names):
        raise ShardError(f"{path} must name 2 to 255 classes, each once, background first; it has {len(names)}")
    return names
