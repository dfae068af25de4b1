"""`data.shuffle=blocks`: an order that keeps neighbours in few shards, for sets that no page cache and no disk holds.

An epoch is a line of all samples, shard after shard, the shards permuted in another way in each epoch. It is cut into
`groups` pieces of nearly equal length, and each piece into windows of `window_shards` shards, inside which samples are
permuted. A step takes its share of samples from all groups, group after group: so ranks that take neighbouring
positions (`BatchSplit.contiguous`) read from few groups, and a node, where the number of nodes divides that of groups,
from its own groups alone, which together have 1/nodes of the shards.

Like `FullShuffle` a pure function of the position: every sample exactly once per epoch, any step at once. Memory: 16
bytes per shard and epoch.
"""

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_deeplab.data.order import BatchSplit, hash_integers, permute, round_keys

_SHARDS, _WINDOW = 3, 4  # first part of each hash, after those of order.py
_KEPT_EPOCHS = 2  # a step may straddle two


@dataclass(frozen=True)
class _Epoch:
    """The line of one epoch. `shards` in their order, where each `ends` on the line, where each group's piece begins.

    `begins` has one entry more than there are groups: the end of the last piece.
    """

    shards: "array[int]"
    ends: "array[int]"
    begins: list[int]

    def begin(self, rank: int) -> int:
        """Where the shard of this rank in the order begins on the line."""
        return self.ends[rank - 1] if rank else 0


class BlockShuffle:
    """See above.

    Args:
        shard_sizes: samples of each shard, in the order of the index.
        seed: the run's.
        window_shards: shards among whose samples is shuffled.
        groups: pieces of an epoch, that are read side by side; more than `global_size` are as good as that many.
        global_size: images of a step, over all ranks.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, seed: int, window_shards: int, groups: int, global_size: int
    ) -> None:
        self.shard_sizes = tuple(shard_sizes)
        self.num_samples = sum(shard_sizes)
        self.seed = seed
        self.window_shards = window_shards
        self.groups = min(groups, global_size)
        self.global_size = global_size
        self._starts = array("q", itertools.accumulate(shard_sizes, initial=0))
        self._epochs: dict[int, _Epoch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_epochs": {}}

    @property
    def steps_ahead(self) -> int | None:
        """See `SampleOrder`: the steps of one window."""
        per_window = self.groups * self.window_shards * self.num_samples // len(self.shard_sizes)
        return max(1, per_window // self.global_size)

    def open_shards(self, split: BatchSplit, rank: int) -> int:
        """See `SampleOrder`: the windows that the rank is in; more would keep others from being evicted."""
        positions = [part for part in split.positions(0, rank) if len(part)]
        groups = {int(p) * self.groups // self.global_size for part in positions for p in part}
        return max(1, len(groups) * self.window_shards)

    def cached_shards(self, num_nodes: int) -> int:
        """How many shards the cache of a node has to hold: per group the last, the current and the next window's."""
        return min(len(self.shard_sizes), -(-self.groups // num_nodes) * 3 * self.window_shards)

    def sample_at(self, position: int) -> int:
        """The sample index at a global position of the training stream."""
        position = int(position)  # numpy integers would overflow in the hashes
        number = position // self.num_samples
        epoch = self._epoch(number)
        group = position % self.global_size * self.groups // self.global_size
        begin, end = epoch.begins[group], epoch.begins[group + 1]
        first = bisect_right(epoch.ends, begin)  # the piece's first shard, by rank in the order
        place = begin + self._count(group, position) - self._count(group, number * self.num_samples)
        window = (bisect_right(epoch.ends, place) - first) // self.window_shards
        last = min(first + (window + 1) * self.window_shards, len(epoch.ends)) - 1
        start, stop = max(begin, epoch.begin(first + window * self.window_shards)), min(end, epoch.ends[last])
        keys = round_keys(_WINDOW, self.seed, number, group, window)
        place = start + permute(place - start, size=stop - start, keys=keys)
        rank = bisect_right(epoch.ends, place)
        return self._starts[epoch.shards[rank]] + place - epoch.begin(rank)

    def _count(self, group: int, stop: int) -> int:
        """How many global positions below `stop` are the group's: in each step the same slots."""
        first, behind = (-(-g * self.global_size // self.groups) for g in (group, group + 1))
        steps, slot = divmod(stop, self.global_size)
        return steps * (behind - first) + min(max(slot - first, 0), behind - first)

    def _epoch(self, number: int) -> _Epoch:
        found = self._epochs.get(number)
        if found is None:
            base = hash_integers(_SHARDS, self.seed, number)
            shards = sorted(range(len(self.shard_sizes)), key=lambda shard: hash_integers(base, shard))
            ends = array("q", itertools.accumulate(self.shard_sizes[shard] for shard in shards))
            start, stop = number * self.num_samples, (number + 1) * self.num_samples
            lengths = (self._count(group, stop) - self._count(group, start) for group in range(self.groups))
            found = _Epoch(array("q", shards), ends, list(itertools.accumulate(lengths, initial=0)))
            for old in sorted(self._epochs)[: 1 - _KEPT_EPOCHS]:
                del self._epochs[old]
            self._epochs[number] = found
        return found
