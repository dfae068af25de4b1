"""What the main thread is doing, as the watchdog's threads see it, and which ranks hold up the others."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch.distributed as dist

from dist_deeplab.distributed.process_group import DistEnv

_FIRST_POLL_S, _POLL_S = 0.005, 0.5
_ASK_S = 2.0  # as often as heartbeats come

T = TypeVar("T")


class Progress:
    """Marks that the main thread leaves and the watchdog's threads read.

    count: grows whenever the main thread begins something. phase: what it began.
    """

    def __init__(self) -> None:
        self.count = 0
        self.phase = "starting"

    def begin(self, phase: str) -> None:
        """Mark that the main thread begins a phase."""
        self.phase = phase
        self.count += 1

    def mark(self) -> None:
        """Mark that the phase advances: in long phases, more often than the watchdog's time limit."""
        self.count += 1

    def watch(self, iterable: Iterable[T], *, waiting: str, working: str) -> Iterator[T]:
        """Yield the items; the phase is `waiting` until the next one arrives and `working` while it is used."""
        iterator = iter(iterable)
        while True:
            self.begin(waiting)
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.begin(working)
            yield item


@dataclass(frozen=True)
class Heartbeat:
    """A rank's published state. tick: counts heartbeats; progress: the main thread's count; place: its code line."""

    rank: int
    host: str
    tick: int
    progress: int
    phase: str
    place: str
    waits: bool

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, {self.phase}, in {self.place}"


def publish_heartbeat(store: dist.Store, beat: Heartbeat) -> None:
    """Write a rank's heartbeat where the others read it."""
    store.set(f"heartbeat/{beat.rank}", json.dumps(asdict(beat)))


def read_heartbeat(store: dist.Store, rank: int) -> Heartbeat | None:
    """A rank's last heartbeat, or None where it never published one."""
    key = f"heartbeat/{rank}"
    return Heartbeat(**json.loads(store.get(key))) if store.check([key]) else None


def watchdog_store(store: dist.Store) -> dist.Store:
    """The part of the shared store that holds heartbeats."""
    return dist.PrefixStore("watchdog", store)


def wait_for_all(env: DistEnv, arrived: dist.Store, heartbeats: dist.Store, progress: Progress) -> None:
    """Wait until all ranks have called this with the same `arrived`, an empty part of the shared store.

    Marks progress whenever the first rank that is missing has published a new heartbeat.
    """
    progress.begin("waiting for other ranks")
    arrived.set(str(env.rank), "")
    arrived.add("count", 1)
    poll_s, asked, missing, last = _FIRST_POLL_S, time.monotonic(), 0, None
    while arrived.add("count", 0) < env.world_size:
        time.sleep(poll_s)
        poll_s = min(1.5 * poll_s, _POLL_S)
        if time.monotonic() - asked < _ASK_S:
            continue
        asked = time.monotonic()
        while missing < env.world_size and arrived.check([str(missing)]):
            missing += 1
        beat = read_heartbeat(heartbeats, missing) if missing < env.world_size else None
        if beat != last:
            progress.mark()
        last = beat
    progress.mark()


def find_stalled(before: dict[int, Heartbeat], after: dict[int, Heartbeat], world_size: int) -> str:
    """A sentence on the ranks that hold up the others, from all heartbeats at two moments a few ticks apart.

    In this order: ranks without a new heartbeat (stopped, swapped out, cut off); ranks whose main thread is behind the
    others'; ranks that are not waiting in a collective while others are.
    """
    silent = [rank for rank in range(world_size) if rank not in after or before.get(rank) == after[rank]]
    if silent and len(silent) < world_size:
        names = [str(after[rank]) if rank in after else f"rank {rank}" for rank in silent]
        return f"no heartbeat from {'; '.join(names)}"
    beats = list(after.values())
    behind = [beat for beat in beats if beat.progress < max(other.progress for other in beats)]
    working = [beat for beat in beats if not beat.waits]
    for stalled, what in ((behind, "the others wait for"), (working, "not waiting for others:")):
        if stalled and len(stalled) < len(beats):
            return f"{what} {'; '.join(map(str, stalled))}"
    return f"all ranks are at the same place: {'; '.join(map(str, beats[:8]))}"
