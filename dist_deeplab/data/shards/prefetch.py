"""Brings the shards of a set at a URL into the node's cache in the order in which a rank will need them.

A process of its own, so that steps wait for a shard only while it is the next one. It ends with the process that
started it: the pipe between them closes, also after `kill -9`.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np

from dist_deeplab.data import order
from dist_deeplab.data.shards.manifest import Manifest, open_index
from dist_deeplab.data.shards.reader import open_shard
from dist_deeplab.errors import UserError

_STEPS_AT_ONCE = 256


@dataclass(frozen=True)
class Plan:
    """Whose shards are wanted: those of `rank` in the steps `start <= step < stop`, with this split and seed."""

    manifest: Manifest
    split: order.BatchSplit
    rank: int
    seed: int
    start: int
    stop: int

    def shards(self) -> list[int]:
        """Return the shards in the order of their first use; within one epoch mostly all of them come."""
        index = open_index(self.manifest)
        wanted: dict[int, None] = {}
        for first in range(self.start, self.stop, _STEPS_AT_ONCE):
            steps = range(first, min(first + _STEPS_AT_ONCE, self.stop))
            positions = np.concatenate([part for step in steps for part in self.split.positions(step, self.rank)])
            samples = order.samples_at(positions, num_samples=self.manifest.num_samples, seed=self.seed)
            wanted.update(dict.fromkeys(index["shard"][samples].tolist()))
            if len(wanted) == len(self.manifest.shards):
                break
        return list(wanted)


def start_prefetch(plan: Plan) -> "subprocess.Popen[bytes]":
    """Start the process; it goes on until all shards are there, or the returned object's `stdin` is closed."""
    process = subprocess.Popen([sys.executable, "-m", "dist_deeplab.data.shards.prefetch"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        pickle.dump(plan, process.stdin)
        process.stdin.flush()
    return process


def main() -> None:
    """Fetch what the plan on stdin says."""
    plan: Plan = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        for number in plan.shards():
            os.close(open_shard(plan.manifest, number))
    except UserError as error:  # whoever reads that shard will meet the same error, and stop the run by it
        print(f"fetching shards ahead ended: {error}", file=sys.stderr, flush=True)
    os._exit(0)  # the thread that waits at the pipe can't be ended otherwise


def _leave_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
