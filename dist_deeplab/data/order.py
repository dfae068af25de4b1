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
    """How a step's global batch is cut: `global_size = world_size * micro_size * accumulation`, always exactly."""

    global_size: int
    micro_size: int
    world_size: int

    @classmethod
    def derive(cls, *, global_size: int, micro_size: int | None, world_size: int) -> "BatchSplit":
        """Return the split; without `micro_size` a rank takes its whole share at once.

        Raises:
            UserError: the sizes do not divide; the message names sizes that do.
        """
        share, rest = divmod(global_size, world_size)
        if rest or not share:
            below, above = share * world_size, (share + 1) * world_size
            sizes = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"batch.global_size={global_size} can't be shared equally by {world_size} processes; use "
                f"batch.global_size={sizes}, or a number of processes that divides {global_size}"
            )
        if micro_size is not None and share % micro_size:
            fitting = [size for size in range(1, share + 1) if share % size == 0]
            raise UserError(
                f"batch.micro_size={micro_size} does not divide a rank's share of {share} images (batch.global_size="
                f"{global_size} over {world_size} processes); use one of {', '.join(map(str, fitting))}"
            )
        return cls(global_size, micro_size or share, world_size)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank adds up to one optimizer step."""
        return self.global_size // (self.micro_size * self.world_size)

    def positions(self, step: int, rank: int) -> np.ndarray:
        """Return a rank's global positions of a step, int64 [accumulation, micro_size].

        Micro-batch-major: position `step*G + a*(W*b) + r*b + j` is image `j` of micro-batch `a` on rank `r`.
        """
        width = self.world_size * self.micro_size
        starts = step * self.global_size + rank * self.micro_size + width * np.arange(self.accumulation, dtype=np.int64)
        return starts[:, None] + np.arange(self.micro_size, dtype=np.int64)[None, :]

    def __str__(self) -> str:
        return (
            f"{self.global_size} images a step = {self.world_size} ranks x {self.micro_size} images x "
            f"{self.accumulation} accumulated micro-batches"
        )
