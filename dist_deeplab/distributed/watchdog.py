"""A thread beside each rank that notices when the run stands still, says which rank it waits for, and ends it.

Every rank writes a sign of life into the store that all share. Where a rank's own main thread has made no progress for
`timeout_s`, its watchdog reads the others' signs, names the ranks that hold up the rest, writes every thread's stack to
`logs/rank_<rank>.stacks` and ends the process: the launcher starts the run again from the last checkpoint.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from dist_deeplab.distributed.meter import Meter
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.stop_request import StopRequest

_TICK_S = 2.0
_PACKAGE = str(Path(__file__).resolve().parent.parent)
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life. tick: counts signs; progress: counts what the main thread did; place: where it is."""

    rank: int
    host: str
    tick: int
    progress: int
    phase: str
    place: str
    waits: bool

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, {self.phase}, in {self.place}"


@contextlib.contextmanager
def watched(
    env: DistEnv, store: dist.Store | None, meter: Meter, stop: StopRequest, *, timeout_s: float, logs: Path
) -> Iterator[None]:
    """Watch over the main thread inside this context; without a store (a single process) nobody else is asked.

    Args:
        env: this rank.
        store: where all ranks can read and write.
        meter: knows of the main thread's progress.
        stop: hears of other ranks that were asked to stop.
        timeout_s: how long the main thread may make no progress.
        logs: folder for the stacks.
    """
    watchdog = Watchdog(env, store, meter, stop, timeout_s=timeout_s, logs=logs)
    threads = [threading.Thread(target=work, daemon=True) for work in (watchdog.tell, watchdog.judge)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watchdog.over.set()
        threads[1].join()
        faulthandler.cancel_dump_traceback_later()  # only now: the thread sets it anew each time
        threads[0].join(2 * _TICK_S)  # it may wait for a store that is gone


class Watchdog:
    """The two threads' work: one tells the others, which may block; one judges, which must not."""

    def __init__(
        self,
        env: DistEnv,
        store: dist.Store | None,
        meter: Meter,
        stop: StopRequest,
        *,
        timeout_s: float,
        logs: Path,
    ) -> None:
        self.env, self.meter, self.stop = env, meter, stop
        self.store: dist.Store | None = None
        if store is not None:  # a connection of its own: one that waits for an answer is closed to other threads
            self.store = dist.PrefixStore("watchdog", getattr(store, "clone", lambda: store)())
        self.timeout_s = timeout_s
        self.tick_s = min(_TICK_S, timeout_s / 4)
        self.stacks = logs / f"rank_{env.rank}.stacks"
        self.over = threading.Event()
        self.main_thread = threading.main_thread().ident or 0
        self.launcher = os.getppid() if env.launcher == "torchrun" else None
        self.tick = 0

    def tell(self) -> None:
        """Publish this rank's sign and wish to stop, and hear of the others' wishes, until the run is over."""
        while not self.over.wait(self.tick_s):
            if self.launcher not in (None, os.getppid()):
                self.stop.hear("torchrun is gone")  # nobody would end or restart this run, and a new one waits for it
            if self.store is None:
                continue
            try:
                self.tick += 1
                self.store.set(f"sign/{self.env.rank}", json.dumps(asdict(self.sign())))
                if self.stop:
                    self.store.set("stop", self.stop.reason)
                elif self.store.check(["stop"]):
                    self.stop.hear(self.store.get("stop").decode())
            except RuntimeError:  # rank 0 is gone or the network is cut: `judge` will see what comes of it
                continue

    def judge(self) -> None:
        """End the process once the main thread has stood still for too long."""
        seen, since = self.meter.progress, time.monotonic()
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        with self.stacks.open("a", encoding="utf-8") as file:
            while not self.over.wait(self.tick_s):
                # Should some library keep Python's lock for good, so that this thread stands still too:
                faulthandler.dump_traceback_later(2 * self.timeout_s + 60, file=file)
                if self.meter.progress != seen:
                    seen, since = self.meter.progress, time.monotonic()
                elif time.monotonic() - since > self.timeout_s:
                    self.give_up(file)

    def give_up(self, file: TextIO) -> None:
        """Say who is to blame, leave the stacks, and end the process."""
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} no progress for {self.timeout_s:.0f} s: {self.sign()}\n")
        file.flush()
        faulthandler.dump_traceback(file)
        verdict = self._within(3 * self.tick_s + 10, self.find_culprits)
        log.error(
            "no progress for %.0f s (distributed.hang_timeout_s); %s; stacks are in %s",
            self.timeout_s,
            verdict
            or f"rank 0's store does not answer: its process has ended or the network to it is cut; {self.sign()}",
            self.stacks,
        )
        logging.shutdown()
        os._exit(1)

    def _within(self, seconds: float, function: Callable[[], str]) -> str:
        """Return the result of a function that may block for ever, or nothing."""
        results: list[str] = []
        thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
        thread.start()
        thread.join(seconds)
        return results[0] if results else ""

    def find_culprits(self) -> str:
        """Return a sentence on the ranks that hold up the others."""
        if self.store is None:
            return str(self.sign())
        before = self.signs()
        time.sleep(2.5 * self.tick_s)
        return name_culprits(before, self.signs(), self.env.world_size)

    def signs(self) -> dict[int, Sign]:
        """Return the last sign of each rank that ever gave one."""
        assert self.store is not None
        keys = {rank: f"sign/{rank}" for rank in range(self.env.world_size)}
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: Sign(**json.loads(self.store.get(key))) for rank, key in there.items()}

    def sign(self) -> Sign:
        """Return what the main thread is doing."""
        place, waits = "unknown", False
        frame = sys._current_frames().get(self.main_thread)
        innermost = frame.f_code.co_name if frame else ""
        while frame is not None:
            file = frame.f_code.co_filename
            waits = waits or _COLLECTIVES in file
            if file.startswith(_PACKAGE):
                inner = "" if frame.f_code.co_name == innermost else f" ({innermost})"
                place = f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}{inner}"
                break
            frame = frame.f_back
        host = socket.gethostname()
        return Sign(self.env.rank, host, self.tick, self.meter.progress, self.meter.phase, place, waits)


def name_culprits(before: dict[int, Sign], after: dict[int, Sign], world_size: int) -> str:
    """Return a sentence on who holds up the others, from the signs at two moments a few ticks apart.

    Suspected are, in this order: ranks that give no sign any more (stopped, swapped out, cut off); ranks whose main
    thread is behind the others'; ranks that are not waiting in a collective while others are.
    """
    silent = [rank for rank in range(world_size) if rank not in after or before.get(rank) == after[rank]]
    if silent and len(silent) < world_size:
        names = [str(after[rank]) if rank in after else f"rank {rank}" for rank in silent]
        return f"no sign of life from {'; '.join(names)}"
    signs = list(after.values())
    behind = [sign for sign in signs if sign.progress < max(other.progress for other in signs)]
    working = [sign for sign in signs if not sign.waits]
    for suspects, what in ((behind, "the others wait for"), (working, "not waiting for others:")):
        if suspects and len(suspects) < len(signs):
            return f"{what} {'; '.join(map(str, suspects))}"
    return f"all ranks are at the same place: {'; '.join(map(str, signs[:8]))}"
