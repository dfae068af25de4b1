"""Two threads beside each rank that notice when it hangs or another rank has failed, say which, and end the process.

Every rank publishes heartbeats in the store that all share. Where a rank's own main thread has made no progress for
`timeout_s`, its watchdog compares the heartbeats of all ranks, names the stalled ones, writes every thread's stack to
`logs/rank_<rank>.stacks` (to stderr where that file cannot be written) and ends the process: the launcher starts the
run again from the last checkpoint. It ends the process, too, where another rank failed and this one still waits for it.
"""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from dist_deeplab.distributed.failure import read_failure
from dist_deeplab.distributed.flight_recorder import dump_flight_recorder
from dist_deeplab.distributed.heartbeat import (
    Heartbeat,
    Progress,
    find_stalled,
    publish_heartbeat,
    read_heartbeat,
    watchdog_store,
)
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.stop_request import StopRequest
from dist_deeplab.distributed.time_limit import within

_TICK_S = 2.0
_DUMP_S = 15.0  # for the flight recorder, whose lock the hung collective may hold
_AFTER_FAILURE_S = 10.0  # in which a rank whose connection broke ends by itself, or by its launcher
_PACKAGE = str(Path(__file__).resolve().parent.parent)
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(
    env: DistEnv,
    store: dist.Store | None,
    progress: Progress,
    stop: StopRequest,
    *,
    timeout_s: float,
    logs: Path | None = None,
) -> Iterator[None]:
    """Watch the main thread inside this context; without a store (a single process) no other rank is asked.

    Args:
        env: this rank.
        store: where all ranks can read and write.
        progress: the main thread's marks.
        stop: gets other ranks' stop requests.
        timeout_s: how long the main thread may make no progress.
        logs: folder for the stacks; None: they are printed.
    """
    watchdog = Watchdog(env, store, progress, stop, timeout_s=timeout_s, logs=logs)
    threads = [threading.Thread(target=work, daemon=True) for work in (watchdog.publish, watchdog.check)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watchdog.over.set()
        threads[1].join()
        faulthandler.cancel_dump_traceback_later()  # only now: the thread sets it again at each tick
        threads[0].join(2 * _TICK_S)  # it may wait for a store that is gone


class Watchdog:
    """The two threads' work: one publishes, which may block; one checks, which must not."""

    def __init__(
        self,
        env: DistEnv,
        store: dist.Store | None,
        progress: Progress,
        stop: StopRequest,
        *,
        timeout_s: float,
        logs: Path | None,
    ) -> None:
        self.env, self.progress, self.stop = env, progress, stop
        self.store: dist.Store | None = None
        self.root: dist.Store | None = None
        if store is not None:  # a connection of its own: one that waits for an answer is closed to other threads
            self.root = getattr(store, "clone", lambda: store)()
            self.store = watchdog_store(self.root)
        self.timeout_s = timeout_s
        self.tick_s = min(_TICK_S, timeout_s / 4)
        self.logs = logs
        self.over = threading.Event()
        self.main_thread = threading.main_thread().ident or 0
        self.launcher = os.getppid() if env.launcher == "torchrun" else None
        self.tick = 0
        self.failed_since = 0.0  # when another rank's failure was read; 0: none was
        self.failure = ""

    def publish(self) -> None:
        """Publish this rank's heartbeat and stop request, and read the others' requests and failures, until the end."""
        while not self.over.wait(self.tick_s):
            if self.launcher not in (None, os.getppid()):
                self.stop.hear("torchrun is gone")  # nothing would end or restart this run, and a new one waits for it
            if self.store is None:
                continue
            with contextlib.suppress(RuntimeError):  # rank 0 is gone or the network is cut: `check` handles that
                self._exchange(self.store)

    def _exchange(self, store: dist.Store) -> None:
        self.tick += 1
        publish_heartbeat(store, self.heartbeat())
        if self.stop:
            store.set("stop", self.stop.reason)
        elif store.check(["stop"]):
            self.stop.hear(store.get("stop").decode())
        assert self.root is not None
        failure = read_failure(self.root)
        if failure is not None and failure.rank != self.env.rank and not self.failed_since:
            self.failure, self.failed_since = str(failure), time.monotonic()

    def check(self) -> None:
        """End the process once the main thread has made no progress for too long, or waits for a rank that failed."""
        seen, since = self.progress.count, time.monotonic()
        with _open_stacks(self.logs, self.env.rank) as file:
            while not self.over.wait(self.tick_s):
                # Should a library keep Python's lock for good, so that this thread hangs too:
                faulthandler.dump_traceback_later(2 * self.timeout_s + 60, file=file)
                if self.failed_since and time.monotonic() - self.failed_since > _AFTER_FAILURE_S:
                    log.error("rank %d ends: %s", self.env.rank, self.failure)
                    self._end()
                if self.progress.count != seen:
                    seen, since = self.progress.count, time.monotonic()
                elif time.monotonic() - since > self.timeout_s:
                    self.give_up(file)

    def give_up(self, file: TextIO) -> None:
        """Write the stacks, name the stalled ranks, and end the process."""
        beat = self.heartbeat()
        title = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} no progress for {self.timeout_s:.0f} s: {beat}\n"
        file = _write_stacks(file, title)
        if self.logs is not None:
            within(_DUMP_S, partial(dump_flight_recorder, self.logs / "flight_recorder", self.env.rank))
        stalled = within(3 * self.tick_s + 10, self.find_stalled)
        log.error(
            "no progress for %.0f s (distributed.hang_timeout_s); %s; stacks are in %s",
            self.timeout_s,
            stalled or f"rank 0's store does not answer: its process has ended or the network to it is cut; {beat}",
            file.name,
        )
        self._end()

    def _end(self) -> None:
        logging.shutdown()
        os._exit(1)

    def find_stalled(self) -> str:
        """A sentence on the ranks that hold up the others."""
        if self.store is None:
            return str(self.heartbeat())
        before = self.heartbeats()
        time.sleep(2.5 * self.tick_s)
        return find_stalled(before, self.heartbeats(), self.env.world_size)

    def heartbeats(self) -> dict[int, Heartbeat]:
        """The last heartbeat of each rank that ever published one."""
        assert self.store is not None
        found = {rank: read_heartbeat(self.store, rank) for rank in range(self.env.world_size)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def heartbeat(self) -> Heartbeat:
        """What the main thread is doing."""
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
        return Heartbeat(self.env.rank, host, self.tick, self.progress.count, self.progress.phase, place, waits)


def _write_stacks(file: TextIO, title: str) -> TextIO:
    """Write every thread's stack, to stderr where the file's disk is full; the file that has them."""
    try:
        file.write(title)
        file.flush()
    except OSError:
        assert sys.__stderr__ is not None
        file = sys.__stderr__
        file.write(title)
        file.flush()
    faulthandler.dump_traceback(file)
    return file


@contextlib.contextmanager
def _open_stacks(logs: Path | None, rank: int) -> Iterator[TextIO]:
    """The file of the stacks, or stderr where there is no folder or it cannot be written."""
    assert sys.__stderr__ is not None
    if logs is None:
        yield sys.__stderr__
        return
    try:
        logs.mkdir(parents=True, exist_ok=True)
        file = (logs / f"rank_{rank}.stacks").open("a", encoding="utf-8")
    except OSError as error:
        log.warning("the watchdog prints stacks to stderr: %s", error)
        yield sys.__stderr__
        return
    with file:
        yield file
