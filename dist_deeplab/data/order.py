"""Which samples form a step, as pure arithmetic on `(seed, step)`: no state, no stored list, any step at once.

The training stream is endless. Its *global position* `p` counts samples from 0; step `s` of global batch size `G`
takes the positions `[sG, (s+1)G)`. An epoch is `N` positions, so a batch may straddle two epochs; each epoch has an
order of its own, in which every sample comes once: see `FullShuffle` here and `BlockShuffle` in blocks.py. (In
`RepeatShuffle` of repeat.py some come several times.) World size, micro-batch size and loader workers only decide who
processes a position, never which sample it is or how it is augmented.

All randomness here is a hash of integers (splitmix64), so it is the same under every version of Python and numpy. It
is computed one position at a time, some 5 microseconds each: on so few numbers numpy would be ten times as slow.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ORDER, _AUGMENTATION, _REPLACEMENT = 0, 1, 2  # first part of each hash, so that the streams share no number
_MASK = 2**64 - 1
OPEN_SHARDS = 64
_FEISTEL_ROUNDS = 8  # 4 suffice for pseudo-randomness in theory (Luby-Rackoff); 8 also for the tiny domains of tests


def _mix(value: int) -> int:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014), 64 bits to 64: one bit flipped flips half of all."""
    value = (value ^ (value >> 30)) * _MIX_1 & _MASK
    value = (value ^ (value >> 27)) * _MIX_2 & _MASK
    return value ^ (value >> 31)


def hash_integers(*parts: int) -> int:
    """64-bit hash of a tuple of non-negative integers."""
    state = 0
    for part in parts:
        state = _mix((state * _GOLDEN + int(part) + _GOLDEN) & _MASK)
    return state


def hash_each(numbers: np.ndarray, *parts: int) -> np.ndarray:
    """`hash_integers(*parts, number)` for each of `numbers`, uint64 of the same shape."""
    state = hash_integers(*parts) * _GOLDEN + _GOLDEN & _MASK
    mixed = numbers.astype(np.uint64) + np.uint64(state)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def uniforms(seed: int, position: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1), float64, that depend on `(seed, position)` alone: one sample's augmentation."""
    bits = [hash_integers(_AUGMENTATION, seed, position, number) >> 11 for number in range(count)]
    return np.array(bits, dtype=np.float64) * 2.0**-53


@functools.lru_cache(maxsize=1024)
def round_keys(*parts: int) -> tuple[int, ...]:
    """Keys of `permute`'s rounds, for one permutation named by `parts`; kept, since neighbours share them."""
    return tuple(hash_integers(*parts, round_) for round_ in range(_FEISTEL_ROUNDS))


def permute(index: int, *, size: int, keys: tuple[int, ...]) -> int:
    """Where a permutation of `range(size)`, fixed by `keys`, sends `index` (`0 <= index < size`).

    A Feistel network over the smallest even number of bits that holds `size`, walked along its cycle until the value
    falls inside the range again (Black and Rogaway 2002): a bijection in O(1) memory, under 4 rounds of walking on
    average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix((right * _GOLDEN + key) & _MASK) & mask)
        value = (left << half) | right
        if value < size:
            return value


class SampleOrder(Protocol):
    """Which sample of a set is shown at each global position; a pure function that other processes compute alike."""

    @property
    def steps_ahead(self) -> int | None:
        """How many steps ahead of their use shards are fetched; None: as many as there are, for the cache holds all."""

    def sample_at(self, position: int) -> int:
        """The sample index at a global position of the training stream."""

    def open_shards(self, split: "BatchSplit", rank: int) -> int:
        """How many shards a loader worker of `rank` keeps open."""


@dataclass(frozen=True)
class FullShuffle:
    """All samples permuted together, in another way in each epoch (`data.shuffle=full`)."""

    num_samples: int
    seed: int

    @property
    def steps_ahead(self) -> int | None:
        """See `SampleOrder`."""
        return None

    def open_shards(self, split: "BatchSplit", rank: int) -> int:
        """See `SampleOrder`: any shard may be next, so as many as cost little."""
        return OPEN_SHARDS

    def sample_at(self, position: int) -> int:
        """See `SampleOrder`."""
        epoch, index = divmod(int(position), self.num_samples)
        return permute(index, size=self.num_samples, keys=round_keys(ORDER, self.seed, epoch))


def replacement_at(position: int, attempt: int, *, num_samples: int, seed: int) -> int:
    """The sample index shown at `position` where `attempt` samples (from 1 on) tried there before were bad."""
    return hash_integers(_REPLACEMENT, seed, position, attempt) % num_samples


@dataclass(frozen=True)
class BatchSplit:
    """How a step's global batch is cut: into `accumulation * world_size` consecutive parts, as equal as can be.

    Part `a * world_size + r` is micro-batch `a` of rank `r`. The first parts hold one image more than the rest where
    the sizes do not divide; so ranks too differ by one image at most, and all make the same number of passes.

    global_size: images of a step.
    micro_size: the most images that a rank takes at once.
    contiguous: a rank's micro-batches lie side by side in the step instead, so that it reads neighbouring positions.
    """

    global_size: int
    micro_size: int
    world_size: int
    contiguous: bool = False

    @classmethod
    def derive(
        cls, *, global_size: int, micro_size: int | None, world_size: int, contiguous: bool = False
    ) -> "BatchSplit":
        """The split; without `micro_size` a rank takes its whole share at once.

        Raises:
            UserError: there are fewer images than ranks.
        """
        if global_size < world_size:
            there, most = (format_count(number, "process", "processes") for number in (world_size, global_size))
            raise UserError(
                f"batch.global_size={global_size} is too few images for {there}; use "
                f"batch.global_size={world_size} or more, or at most {most}"
            )
        return cls(global_size, micro_size or -(-global_size // world_size), world_size, contiguous)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank adds up to one optimizer step: as few as `micro_size` lets it be."""
        return -(-self.global_size // (self.micro_size * self.world_size))

    @property
    def num_parts(self) -> int:
        """Micro-batches of all ranks in a step."""
        return self.accumulation * self.world_size

    @property
    def largest(self) -> int:
        """Images of the largest part; it may be less than `micro_size`."""
        return -(-self.global_size // self.num_parts)

    @property
    def is_even(self) -> bool:
        """Whether all parts are of one size."""
        return self.global_size % self.num_parts == 0

    @property
    def has_empty_parts(self) -> bool:
        """Whether some ranks have nothing in their last micro-batch; possible with a `micro_size` of 1 only."""
        return self.global_size < self.num_parts

    @property
    def micro_sizes(self) -> list[int]:
        """The values of `micro_size` that make a difference for this many images and ranks, largest first."""
        share = -(-self.global_size // self.world_size)
        return sorted({-(-share // accumulation) for accumulation in range(1, share + 1)}, reverse=True)

    def sizes(self, rank: int) -> list[int]:
        """How many images each of a rank's micro-batches holds: the same in every step."""
        size, rest = divmod(self.global_size, self.num_parts)
        return [size + (part < rest) for part in range(rank, self.num_parts, self.world_size)]

    def positions(self, step: int, rank: int) -> list[np.ndarray]:
        """The global positions of each of a rank's micro-batches in a step, int64."""
        size, rest = divmod(self.global_size, self.num_parts)
        sizes = self.sizes(rank)
        if self.contiguous:
            larger = rest // self.world_size * rank + min(rest % self.world_size, rank)  # parts of the ranks before
            first = step * self.global_size + rank * self.accumulation * size + larger
            starts = list(itertools.accumulate(sizes[:-1], initial=first))
        else:
            parts = range(rank, self.num_parts, self.world_size)
            starts = [step * self.global_size + part * size + min(part, rest) for part in parts]
        return [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def __str__(self) -> str:
        up_to, batch = "" if self.is_even else "up to ", "accumulated micro-batch"
        text = (
            f"{format_count(self.global_size, 'image')} a step = {format_count(self.world_size, 'rank')} x "
            f"{up_to}{format_count(self.largest, 'image')} x {format_count(self.accumulation, batch, f'{batch}es')}"
        )
        waiting = 1 - self.global_size / (self.num_parts * self.largest)
        return text if self.is_even else f"{text} (uneven: ranks wait for others, some {waiting:.0%} of the time)"
