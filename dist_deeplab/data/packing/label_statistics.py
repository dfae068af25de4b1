"""What the masks of a data set hold, before anything is packed: pixels and images of every label."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dist_deeplab.data.image_file import DEFAULT, DecodeError, DecodeOptions
from dist_deeplab.data.packing.label_map import LabelMap
from dist_deeplab.data.packing.labels import LabelSpace, colours_in, count_values, decode_mask
from dist_deeplab.data.packing.ordered_map import ordered_map
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.shards.manifest import ShardError
from dist_deeplab.logs import format_count

_MAX_SHOWN = 12


@dataclass
class LabelStatistics:
    """pixels, images: int64 [256], of every label value: how many pixels have it, how many masks hold it."""

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    images: np.ndarray = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    example: dict[int, Path] = field(default_factory=dict)
    num_masks: int = 0

    def add(self, mask: Path, histogram: np.ndarray) -> None:
        """Count one mask with `histogram`, int [256] pixels of each value."""
        self.pixels += histogram
        self.images += histogram > 0
        self.num_masks += 1
        for value in np.flatnonzero(histogram):
            self.example.setdefault(int(value), mask)

    def values(self) -> list[int]:
        """The label values that occur."""
        return [int(value) for value in np.flatnonzero(self.pixels)]

    def require(self, labels: LabelSpace) -> None:
        """Check that all values are classes or void.

        Raises:
            ShardError: some are not; all of them are named, with the most frequent one's first mask.
        """
        unexpected = labels.unexpected(self.pixels)
        if not unexpected:
            return
        worst = max(unexpected, key=lambda value: self.images[value])
        listed = ", ".join(map(str, unexpected[:_MAX_SHOWN])) + (" ..." if len(unexpected) > _MAX_SHOWN else "")
        what = f"the label {listed}" if len(unexpected) == 1 else f"the labels {listed}"
        raise ShardError(
            f"{self.example[worst]} and others ({int(self.images[worst])} of "
            f"{format_count(self.num_masks, 'mask')}) holds {what}, but "
            f"{labels.describe()}; give all classes, another --ignore-label, or a --label-map that says what it means"
        )


def count_labels(
    samples: Sequence[SourceSample],
    *,
    label_map: LabelMap | None = None,
    options: DecodeOptions = DEFAULT,
    workers: int = 1,
    progress: Callable[[Iterable[SourceSample]], Iterable[SourceSample]] = iter,
) -> LabelStatistics:
    """Pixels and images per label value, over all masks.

    Raises:
        ShardError: a mask is damaged, lossy, or in colours that no label map explains (its colours are named).
    """
    statistics = LabelStatistics()
    count = functools.partial(_histogram, label_map=label_map, options=options)
    for sample, histogram in zip(samples, ordered_map(count, progress(samples), workers=workers), strict=True):
        statistics.add(sample.label, histogram)
    return statistics


def _histogram(sample: SourceSample, *, label_map: LabelMap | None, options: DecodeOptions) -> np.ndarray:
    try:
        content = sample.label.read_bytes()
    except OSError as error:
        raise ShardError(f"cannot read the label {sample.label}: {error.strerror}") from None
    try:
        return count_values(decode_mask(content, label_map, options))
    except DecodeError as error:
        if label_map is None and "in colour" in str(error):
            listed = ", ".join(" ".join(map(str, colour)) for colour in colours_in(content, most=_MAX_SHOWN))
            raise ShardError(
                f"the mask {sample.label} is in colour, not class indices; say what its colours mean in a "
                f"--label-map file of `R G B name` lines (there are, most frequent first: {listed})"
            ) from None
        raise ShardError(f"{sample.label}: {error}") from None
