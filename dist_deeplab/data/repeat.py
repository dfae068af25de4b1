"""`data.repeat_threshold`: images of rare classes come several times in an epoch.

The repeat factors are those of LVIS (Gupta, Dollar and Girshick 2019, https://arxiv.org/abs/1908.03195, "repeat factor
sampling"): `r(c) = max(1, sqrt(threshold / f(c)))`, where `f(c)` is the share of images that contain class `c`; an
image has the largest of its classes' factors. Everything is a pure function of seed and position, at any step at once.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_deeplab.data.order import OPEN_SHARDS, ORDER, BatchSplit, hash_each, permute, round_keys

_PHASE = 5  # first part of its hash, after those of order.py and blocks.py
_BITS = np.uint64(32)  # of the fractional part of a repeat factor
_KEPT_EPOCHS = 2  # a step may straddle two
_ROWS = 2**14  # unpacked at once


@dataclass(frozen=True)
class RepeatFactors:
    """Repeat factors of all `classes` and `samples`, float64, from 1 on; `images`: how many contain a class, int64."""

    images: np.ndarray
    classes: np.ndarray
    samples: np.ndarray

    def describe(self, class_names: Sequence[str]) -> str:
        """A sentence on the length of an epoch and the class that is repeated most."""
        rarest = int(self.classes.argmax())
        return (
            f"{len(self.samples):,} images come some {self.samples.sum():,.0f} times in an epoch, those of "
            f"{class_names[rarest]} x{self.classes[rarest]:.3g}"
        )


def repeat_factors(presence: np.ndarray, *, num_classes: int, threshold: float) -> RepeatFactors:
    """The repeat factors of a set.

    Args:
        presence: which classes each sample contains, see `shards/presence.py`.
        num_classes: of the set.
        threshold: classes in a smaller share of the images are repeated. A class in no image has the factor 1, as an
            image without a class has.
    """

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, len(presence), _ROWS):
            bits = np.unpackbits(presence[start : start + _ROWS], axis=1, count=num_classes, bitorder="little")
            yield bits.astype(bool)

    images: np.ndarray = sum((there.sum(axis=0) for there in chunks()), np.zeros(num_classes, dtype=np.int64))
    shares = np.where(images > 0, images / len(presence), 1.0)
    classes = np.maximum(1.0, np.sqrt(threshold / shares))
    return RepeatFactors(
        images, classes, np.concatenate([np.where(there, classes, 1.0).max(axis=1) for there in chunks()])
    )


@dataclass(frozen=True)
class _Epoch:
    """Its first global position, and where the copies of each sample end in the line of all its copies."""

    begin: int
    ends: np.ndarray

    def __contains__(self, position: int) -> bool:
        return self.begin <= position < self.begin + int(self.ends[-1])


class RepeatShuffle:
    """All samples permuted together, each as often in an epoch as its repeat factor says (a `SampleOrder`).

    Before epoch `e`, sample `i` of factor `r` has come `floor(e r + u)` times, `u` a hash of `(seed, i)` in [0, 1). So
    in each epoch it comes `floor(r)` times, and once more with a probability of r's fractional part, as in LVIS; over
    any number of epochs it comes within 1 of `e r` times, and where an epoch begins is known without those before it.
    Where all factors are 1 the order is that of `FullShuffle`. Memory: 12 bytes per sample, and 4 per kept epoch.

    Args:
        factors: the samples' repeat factors, float64 [num_samples], from 1 on; held to 2**-32.
        seed: the run's.
    """

    def __init__(self, factors: np.ndarray, *, seed: int) -> None:
        self.num_samples = len(factors)
        self.seed = seed
        fixed = np.rint(factors * 2.0**32).astype(np.uint64)
        self._whole = (fixed >> _BITS).astype(np.uint32)
        self._fraction = fixed.astype(np.uint32)  # the lower 32 bits
        self._phase = (hash_each(np.arange(self.num_samples), _PHASE, seed) >> _BITS).astype(np.uint32)
        self._epochs: dict[int, _Epoch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_epochs": {}}

    @property
    def steps_ahead(self) -> int | None:
        """See `SampleOrder`."""
        return None

    def open_shards(self, split: BatchSplit, rank: int) -> int:
        """See `SampleOrder`: any shard may be next, so as many as cost little."""
        return OPEN_SHARDS

    def sample_at(self, position: int) -> int:
        """The sample index at a global position of the training stream."""
        position = int(position)  # numpy integers would overflow in the hashes
        number = next((number for number, epoch in self._epochs.items() if position in epoch), None)
        if number is None:  # an epoch has num_samples positions or more
            number = bisect_right(range(position // self.num_samples + 1), position, key=self._begin) - 1
        epoch = self._epoch(number)
        keys = round_keys(ORDER, self.seed, number)
        return bisect_right(epoch.ends, permute(position - epoch.begin, size=int(epoch.ends[-1]), keys=keys))

    def _extras(self, number: int) -> np.ndarray:
        """How often each sample has come beyond the whole part of its factor before epoch `number`, uint64."""
        return (self._fraction.astype(np.uint64) * np.uint64(number) + self._phase) >> _BITS  # exact below epoch 2**32

    def _begin(self, number: int) -> int:
        return number * int(self._whole.sum(dtype=np.uint64)) + int(self._extras(number).sum())

    def _epoch(self, number: int) -> _Epoch:
        found = self._epochs.get(number)
        if found is None:
            copies = self._whole + self._extras(number + 1) - self._extras(number)
            small = copies.sum() < 2**32
            found = _Epoch(self._begin(number), np.cumsum(copies, dtype=np.uint32 if small else np.uint64))
            for old in sorted(self._epochs)[: 1 - _KEPT_EPOCHS]:
                del self._epochs[old]
            self._epochs[number] = found
        return found
