"""Brings the shards of a set at a URL into the node's cache in the order in which a rank will need them.

A process of its own, so that steps wait for a shard only while it is the next one. Where the cache holds less than the
set (`data.shuffle=blocks`), it stays one window ahead of the steps, which it hears of through a pipe. It ends with the
process that started it: the pipe between them closes, also after `kill -9`.
"""

import contextlib
import itertools
import os
import pickle
import struct
import subprocess
import sys
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from dist_deeplab.data.order import BatchSplit, SampleOrder
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.data.shards.reader import open_shard
from dist_deeplab.errors import UserError

_STEP = struct.Struct("<q")


@dataclass(frozen=True)
class Plan:
    """Whose shards are wanted: those of `rank` in the steps `start <= step < stop`, in this order and split."""

    manifest: Manifest
    order: SampleOrder
    split: BatchSplit
    rank: int
    start: int
    stop: int

    def shards(self) -> Iterator[tuple[int, int]]:
        """`(step, shard)` of the first uses; where the order limits how far ahead, also of uses long after the last."""
        ends = list(itertools.accumulate(shard.num_samples for shard in self.manifest.shards))
        ahead = self.order.steps_ahead
        used: dict[int, int] = {}  # shard -> step of its last use
        for step in range(self.start, self.stop):
            for position in itertools.chain.from_iterable(self.split.positions(step, self.rank)):
                shard = bisect_right(ends, self.order.sample_at(position))
                last = used.get(shard)
                used[shard] = step
                if last is None or (ahead is not None and step - last > ahead):
                    yield step, shard
            if ahead is None and len(used) == len(ends):
                return


class Prefetch:
    """The process; it fetches until all shards are there, or `close` is called."""

    def __init__(self, plan: Plan) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dist_deeplab.data.shards.prefetch"], stdin=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self._pipe = self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(plan, self._pipe)
            self._pipe.flush()
        os.set_blocking(self._pipe.fileno(), False)

    def at(self, step: int) -> None:
        """Tell the process which step the training has come to; never waits for it."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe.fileno(), _STEP.pack(step))

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.close()
        self.process.wait()


class _Progress:
    """The step that the training has come to, heard from the pipe; at its end this process ends too."""

    def __init__(self, start: int) -> None:
        self._step = start
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait_for(self, step: int) -> None:
        """Wait until the training has come to `step`."""
        with self._changed:
            self._changed.wait_for(lambda: self._step >= step)

    def _listen(self) -> None:
        while len(said := sys.stdin.buffer.read(_STEP.size)) == _STEP.size:
            with self._changed:
                (self._step,) = _STEP.unpack(said)
                self._changed.notify_all()
        os._exit(0)


def main() -> None:
    """Fetch what the plan on stdin says."""
    plan: Plan = pickle.load(sys.stdin.buffer)
    progress = _Progress(plan.start)
    try:
        for step, shard in plan.shards():
            if plan.order.steps_ahead is not None:
                progress.wait_for(step - plan.order.steps_ahead)
            os.close(open_shard(plan.manifest, shard))
    except UserError as error:  # whoever reads that shard will meet the same error, and stop the run by it
        print(f"fetching shards ahead ended: {error}", file=sys.stderr, flush=True)
    os._exit(0)  # the thread that waits at the pipe can't be ended otherwise


if __name__ == "__main__":
    main()
