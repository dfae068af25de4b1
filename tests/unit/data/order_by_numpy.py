"""The sample order of data.shuffle=full by numpy, on whole arrays at once: the reference for tests."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ORDER = 0
_FEISTEL_ROUNDS = 8


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of uint64 values."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def hash_integers(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 hashes of tuples of non-negative integers, broadcast against each other; at least 1-d."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state * _GOLDEN + np.atleast_1d(np.asarray(part)).astype(np.uint64) + _GOLDEN)
    return state


def permute(index: np.ndarray, *, size: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where `epoch`'s permutation of `range(size)` sends `index`; both int64 of one shape, `0 <= index < size`."""
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
    """The sample index, int64, shown at each global position (int64 [n]) of the training stream."""
    epoch, index = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    return permute(index, size=num_samples, seed=seed, epoch=epoch)
