"""The timeline of a step on n ranks: a host that launches, a device that computes, collectives that overlap or block.

All ranks do the same work, so one of them stands for all. What it computes between two collectives comes as a list of
events; what a collective costs comes from a `Network`. Four things are simulated:

- the host launches kernels one after the other and runs ahead of the device, but the device can't overtake it;
- collectives of one process group run one at a time in their order: `batch_norm`, for which the device waits, and
  `gradients`, which overlap with the backward pass until its end; and the step's small sums in a group of their own;
- collectives of several groups under way together share the links;
- what computes and what communicates share the device: `Machine.capacity`.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.network import FREE, Collective, Network

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # torch DDP's bucket_cap_mb=25 and its smaller first one
_STEPS = 4  # simulated in a row; the last one is in the steady state
_NOTHING_LEFT_S = 1e-12


@dataclass(frozen=True)
class Event:
    """Something to communicate, and the compute between the event before and this one.

    kind: gather or sum (of a synchronised batch norm, forward or backward; the device waits for it), gradient (of one
        parameter), bucket (of gradients, all-reduced while backward continues), wait (the end of backward, where the
        device waits for all buckets) or end (of the update).
    compute_s: seconds on the device.
    num_bytes: that each rank contributes.
    launches: kernels that the host launches for this compute.
    weight_gradients_s: the part of `compute_s` in which gradients of convolutions' weights are computed.
    """

    kind: str
    compute_s: float
    num_bytes: int = 0
    launches: int = 0
    weight_gradients_s: float = 0.0


@dataclass(frozen=True)
class SmallSums:
    """What ranks agree on per step (valid pixels, stop requests, bad samples).

    ahead: they travel in a group of their own and are read one step later, so nobody waits. Otherwise the host waits
    for them at the beginning of each step, before it launches anything.
    """

    collective: Collective = FREE
    ahead: bool = True


@dataclass(frozen=True)
class Machine:
    """What a step runs on.

    ranks: number of ranks.
    network: costs of their collectives.
    launch_s: host seconds per kernel launched; 0 for a CPU, and for a CUDA graph.
    capacity: of what is shared by compute and communication: 1 for a GPU; for a CPU the cores that all ranks share.
    compute_demand: of that, while all ranks compute: 1 for a GPU; for a CPU the number of ranks.
    slowest: the slowest rank's compute as a multiple of a usual one's; all wait for it.
    host_computes: whether host and device are the same (a CPU), so that the host can't run ahead.
    norm_ranks: how many ranks, one after the other, share batch norm's statistics; 0: all.
    own_group: whether batch norm has a process group of its own; else it queues up behind buckets of gradients.
    late_weight_gradients: whether weights' gradients are computed while batch norm's next collective travels.
    sums: the step's small sums.
    """

    ranks: int
    network: Network
    launch_s: float = 0.0
    capacity: float = 1.0
    compute_demand: float = 1.0
    slowest: float = 1.0
    host_computes: bool = False
    norm_ranks: int = 0
    own_group: bool = True
    late_weight_gradients: bool = False
    sums: SmallSums = SmallSums()


@dataclass(frozen=True)
class Step:
    """Seconds of a step and what they went to; the parts add up.

    compute_s: of a usual rank that has the device for itself.
    straggling_s: what the slowest rank takes longer.
    sharing_s: what compute loses to communication at the same time.
    host_s: the device waits for the host: its launches, and the small sums where it waits for these.
    batch_norm_s: the device waits for batch norm's collectives.
    gradients_s: the device waits for the last buckets after the backward pass.
    """

    compute_s: float = 0.0
    straggling_s: float = 0.0
    sharing_s: float = 0.0
    host_s: float = 0.0
    batch_norm_s: float = 0.0
    gradients_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        device_s = self.compute_s + self.straggling_s + self.sharing_s
        return device_s + self.host_s + self.batch_norm_s + self.gradients_s


def bucketed(events: Iterable[Event]) -> Iterator[Event]:
    """The same events with gradients collected into the buckets that torch's DDP would make of them."""
    compute_s, weights_s, launches, num_bytes, limit = 0.0, 0.0, 0, 0, FIRST_BUCKET
    for event in events:
        compute_s += event.compute_s
        weights_s += event.weight_gradients_s
        launches += event.launches
        if event.kind == "gradient":
            num_bytes += event.num_bytes
        if num_bytes >= limit or (event.kind == "wait" and num_bytes):
            yield Event("bucket", compute_s, num_bytes, launches, weights_s)
            compute_s, weights_s, launches, num_bytes, limit = 0.0, 0.0, 0, 0, BUCKET
        if event.kind != "gradient":
            yield replace(event, compute_s=compute_s, launches=launches, weight_gradients_s=weights_s)
            compute_s, weights_s, launches = 0.0, 0.0, 0


def simulate(events: Sequence[Event], machine: Machine) -> Step:
    """A step in the steady state, in which the host has run ahead as far as it can.

    Args:
        events: of a step, with buckets (see `bucketed`), in order.
        machine: what it runs on.
    """
    timeline = _Timeline(machine)
    for _ in range(_STEPS):
        step = timeline.step(events)
    return step


@dataclass
class _UnderWay:
    """What is left of a collective."""

    latency_s: float
    transfer_s: float
    demand: float


@dataclass
class _Timeline:
    """The device's time `now`, the moment at which the host has launched all so far, and collectives under way.

    queues: {process group: its collectives in order, of which the first is under way}.
    """

    machine: Machine
    now: float = 0.0
    host: float = 0.0
    queues: dict[str, deque[_UnderWay]] = field(default_factory=dict)

    def step(self, events: Sequence[Event]) -> Step:
        """Simulate one step."""
        host_s = self._agree()
        compute_s = sharing_s = batch_norm_s = gradients_s = 0.0
        norm_group = "batch_norm" if self.machine.own_group else "gradients"
        for event in events:
            waits = event.kind in ("gather", "sum") and self.machine.ranks > 1
            late_s = event.weight_gradients_s if waits and self.machine.late_weight_gradients else 0.0
            compute_s += event.compute_s
            launched = self.host + event.launches * self.machine.launch_s
            host_s += self._pass(until=self.host + min(1, event.launches) * self.machine.launch_s)
            sharing_s += self._compute(event.compute_s - late_s)
            host_s += self._pass(until=launched)
            self.host = max(self.host, launched)
            if self.machine.ranks == 1:
                continue
            if waits:
                self._start(norm_group, event)
                sharing_s += self._compute(late_s)
                batch_norm_s += self._pass(group=norm_group)
            elif event.kind == "bucket":
                self._start("gradients", event)
            elif event.kind == "wait":
                gradients_s += self._pass(group="gradients")
        straggling_s = compute_s * (self.machine.slowest - 1)
        return Step(compute_s, straggling_s, sharing_s, host_s, batch_norm_s, gradients_s)

    def _compute(self, seconds: float) -> float:
        """Let the slowest rank compute what takes a usual one `seconds`; what communication costs it."""
        work_s = seconds * self.machine.slowest
        return self._pass(work_s=work_s) - work_s

    def _agree(self) -> float:
        """Send the step's small sums; the seconds for which the device waits for those that the host waits for."""
        sums = self.machine.sums
        waited_s = 0.0
        if self.machine.ranks > 1 and sums.ahead:
            waited_s = self._pass(group="sums")  # the last step's
            self._enqueue("sums", sums.collective)
        elif self.machine.ranks > 1:
            self.host += sums.collective.seconds
        return waited_s

    def _start(self, group: str, event: Event) -> None:
        network, ranks = self.machine.network, self.machine.ranks
        if event.kind != "bucket" and self.machine.norm_ranks:
            ranks = min(ranks, self.machine.norm_ranks)
        cost = network.all_gather if event.kind == "gather" else network.all_reduce
        self._enqueue(group, cost(event.num_bytes, ranks))

    def _enqueue(self, group: str, collective: Collective) -> None:
        left = _UnderWay(collective.latency_s, collective.transfer_s, collective.demand)
        self.queues.setdefault(group, deque()).append(left)

    def _pass(self, *, work_s: float = 0.0, until: float = -math.inf, group: str = "") -> float:
        """Let time pass until `work_s` is computed, `until` has come, and `group` is idle; the seconds it took.

        Everything under way advances at the speed that the shared device allows; transfers share the links too.
        """
        began = self.now
        while work_s > _NOTHING_LEFT_S or self.now < until - _NOTHING_LEFT_S or self.queues.get(group):
            active = [queue[0] for queue in self.queues.values() if queue]
            demand = sum(one.demand for one in active) + (self.machine.compute_demand if work_s > 0 else 0.0)
            speed = min(1.0, self.machine.capacity / demand) if demand else 1.0
            transferring = sum(one.latency_s <= _NOTHING_LEFT_S for one in active)
            shared = speed / max(1, transferring)
            moments = [
                one.latency_s / speed if one.latency_s > _NOTHING_LEFT_S else one.transfer_s / shared for one in active
            ]
            if work_s > _NOTHING_LEFT_S:
                moments.append(work_s / speed)
            if self.now < until:
                moments.append(until - self.now)
            passed = min(moments)
            self.now += passed
            work_s -= passed * speed
            for one in active:
                if one.latency_s > _NOTHING_LEFT_S:
                    one.latency_s -= passed * speed
                else:
                    one.transfer_s -= passed * shared
            self._drop_finished()
        if self.machine.host_computes:
            self.host = max(self.host, self.now)
        return self.now - began

    def _drop_finished(self) -> None:
        for queue in self.queues.values():
            if queue and max(queue[0].latency_s, queue[0].transfer_s) <= _NOTHING_LEFT_S:
                queue.popleft()
