"""Which samples form a step, as pure arithmetic on `(seed, step)`: no state, no stored list, any step at once.

The training stream is endless. Its *global position* `p` counts samples from 0; step `s` of global batch size `G`
takes the positions `[sG, (s+1)G)`. Position `p` shows sample `permutation(p mod N)` of epoch `p div N`, where each
epoch has a permutation of its own. A batch may straddle two epochs. World size, micro-batch size and loader workers
only decide who processes a position, never which sample it is or how it is augmented.

All randomness here is a hash of integers (splitmix64), so it is the same under every version of numpy and torch.
"""

from dataclasses import dataclass

import numpy as np

from dist_deeplab.errors import UserError

_GOLDEN_INT, _MIX_1_INT, _MIX_2_INT = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN = np.uint64(_GOLDEN_INT)
_MIX_1 = np.uint64(_MIX_1_INT)
_MIX_2 = np.uint64(_MIX_2_INT)
_ORDER, _AUGMENTATION, _REPLACEMENT = 0, 1, 2  # first part of each hash, so that the streams share no number
_MASK = 2**64 - 1
_FEISTEL_ROUNDS = 8  # 4 suffice for pseudo-randomness in theory (Luby-Rackoff); 8 also for the tiny domains of tests


def _mix(value: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of uint64 values (Steele, Lea and Flood 2014): one bit in flips half of all."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def _mix_one(value: int) -> int:
    """Return what `_mix` returns, of a single value below 2**64: on small arrays numpy is ten times as slow."""
    value = (value ^ (value >> 30)) * _MIX_1_INT & _MASK
    value = (value ^ (value >> 27)) * _MIX_2_INT & _MASK
    return value ^ (value >> 31)


def hash_one(*parts: int) -> int:
    """Return what `hash_integers` returns, of a single tuple."""
    state = 0
    for part in parts:
        state = _mix_one((state * _GOLDEN_INT + int(part) + _GOLDEN_INT) & _MASK)
    return state


def hash_integers(*parts: int | np.ndarray) -> np.ndarray:
    """Return uint64 hashes of tuples of non-negative integers, broadcast against each other; at least 1-d."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state * _GOLDEN + np.atleast_1d(np.asarray(part)).astype(np.uint64) + _GOLDEN)
    return state


def uniforms(seed: int, position: int, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1), float64, that depend on `(seed, position)` alone: one sample's augmentation."""
    bits = [hash_one(_AUGMENTATION, seed, position, number) >> 11 for number in range(count)]
    return np.array(bits, dtype=np.float64) * 2.0**-53


def permute(index: np.ndarray, *, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Return where `epoch`'s permutation of `range(size)` sends `index`; both int64 of one shape, `0 <= index < size`.

    A Feistel network over the smallest even number of bits that holds `size`, walked along its cycle until the value
    falls inside the range again (Black and Rogaway 2002): a bijection in O(1) memory, under 4 rounds of walking on
    average.
    """
    half = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [hash_integers(_ORDER, seed, epoch, round_) for round_ in range(_FEISTEL_ROUNDS)]
    value = np.asarray(index).astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right * _GOLDEN + key[outside]) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def samples_at(positions: np.ndarray, *, num_samples: int, seed: int) -> np.ndarray:
    """Return the sample index, int64, shown at each global position (int64 [n]) of the training stream."""
    positions = np.asarray(positions, dtype=np.int64)
    epoch, index = np.divmod(positions, num_samples)
    return permute(index, size=num_samples, seed=seed, epoch=epoch)


def sample_at(position: int, *, num_samples: int, seed: int) -> int:
    """Return what `samples_at` returns, of a single position."""
    epoch, value = divmod(int(position), num_samples)
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [hash_one(_ORDER, seed, epoch, round_) for round_ in range(_FEISTEL_ROUNDS)]
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix_one((right * _GOLDEN_INT + key) & _MASK) & mask)
        value = (left << half) | right
        if value < num_samples:
            return value


def replacement_at(position: int, attempt: int, *, num_samples: int, seed: int) -> int:
    """Return the sample index shown at `position` where `attempt` samples (from 1 on) tried there before were bad."""
    return hash_one(_REPLACEMENT, seed, position, attempt) % num_samples


@dataclass(frozen=True)
class BatchSplit:
    """How a step's global batch is cut: into `accumulation * world_size` consecutive parts, as equal as can be.

    Part `a * world_size + r` is micro-batch `a` of rank `r`. The first parts hold one image more than the rest where
    the sizes do not divide; so ranks too differ by one image at most, and all make the same number of passes.

    global_size: images of a step.
    micro_size: the most images that a rank takes at once.
    """

    global_size: int
    micro_size: int
    world_size: int

    @classmethod
    def derive(cls, *, global_size: int, micro_size: int | None, world_size: int) -> "BatchSplit":
        """Return the split; without `micro_size` a rank takes its whole share at once.

        Raises:
            UserError: there are fewer images than ranks.
        """
        if global_size < world_size:
            raise UserError(
                f"batch.global_size={global_size} is too few images for {world_size} processes; use "
                f"batch.global_size={world_size} or more, or at most {global_size} processes"
            )
        return cls(global_size, micro_size or -(-global_size // world_size), world_size)

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
        """Return how many images each of a rank's micro-batches holds: the same in every step."""
        size, rest = divmod(self.global_size, self.num_parts)
        return [size + (part < rest) for part in range(rank, self.num_parts, self.world_size)]

    def positions(self, step: int, rank: int) -> list[np.ndarray]:
        """Return the global positions of each of a rank's micro-batches in a step, int64."""
        size, rest = divmod(self.global_size, self.num_parts)
        parts = range(rank, self.num_parts, self.world_size)
        starts = [step * self.global_size + part * size + min(part, rest) for part in parts]
        return [np.arange(start, start + size) for start, size in zip(starts, self.sizes(rank), strict=True)]

    def __str__(self) -> str:
        up_to = "" if self.is_even else "up to "
        text = (
            f"{self.global_size} images a step = {self.world_size} ranks x {up_to}{self.largest} images x "
            f"{self.accumulation} accumulated micro-batches"
        )
        waiting = 1 - self.global_size / (self.num_parts * self.largest)
        return text if self.is_even else f"{text} (uneven: ranks wait for others, some {waiting:.0%} of the time)"
