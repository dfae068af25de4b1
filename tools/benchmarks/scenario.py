"""A workload on a cluster as one record: what a step takes on n GPUs, and which change would help most."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.events import Workload, measured_events, modelled_events
from benchmarks.modelled_gpu import H100, Gpu
from benchmarks.network import Collective, Nccl
from benchmarks.stragglers import NO_STRAGGLERS, Stragglers
from benchmarks.timeline import Event, Machine, SmallSums, Step, simulate

SMALL_SUMS_BYTES = 64  # valid pixels of each output, stop requests, bad samples: float64
GLOO_HOP_S = 75e-6  # from host to host; gloo sums in a ring of 2 (n - 1) hops


@dataclass(frozen=True)
class Scenario:
    """All that a step's time depends on, the number of ranks apart.

    gpu: rates of the GPU whose compute is modelled; None measures this process's device instead.
    launch_s: the host's seconds per kernel.
    step_s: seconds that a step was measured to take on one such GPU alone, to which all kernels are scaled; 0: as
        modelled.
    compressed: whether gradients travel in bf16.
    sums_ahead: whether the step's small sums travel one step ahead, by NCCL; else the host waits for gloo's.
    own_group: whether batch norm has a process group of its own.
    norm_ranks: how many ranks share batch norm's statistics; 0: all.
    late_weight_gradients: whether weights' gradients are computed while batch norm's next sums travel.
    one_kernel: whether one kernel merges batch norm's sums, as one merges gathered statistics.
    """

    workload: Workload
    network: Nccl
    gpu: Gpu | None = H100
    launch_s: float = 7e-6
    stragglers: Stragglers = NO_STRAGGLERS
    step_s: float = 0.0
    compressed: bool = False
    sums_ahead: bool = True
    own_group: bool = True
    norm_ranks: int = 0
    late_weight_gradients: bool = False
    one_kernel: bool = False

    def step(self, ranks: int) -> Step:
        """A step on `ranks` GPUs."""
        return simulate(self.events(ranks), self.machine(ranks))

    def efficiency(self, ranks: int) -> float:
        """Step time of one GPU alone as a share of that on `ranks`."""
        return self.step(1).seconds / self.step(ranks).seconds

    def images_per_s(self, ranks: int) -> float:
        """Images per second and GPU."""
        return self.workload.images / self.step(ranks).seconds

    def machine(self, ranks: int) -> Machine:
        """What `ranks` GPUs are for the simulation."""
        sums = self.network.all_reduce(SMALL_SUMS_BYTES, ranks)
        return Machine(
            ranks,
            self.network,
            launch_s=self.launch_s,
            slowest=self.stragglers.expected_maximum(ranks),
            own_group=self.own_group,
            norm_ranks=self.norm_ranks,
            late_weight_gradients=self.late_weight_gradients,
            sums=SmallSums(sums if self.sums_ahead else Collective(2 * (ranks - 1) * GLOO_HOP_S), self.sums_ahead),
        )

    def events(self, ranks: int) -> list[Event]:
        """The step's events on each of `ranks` GPUs."""
        sharing = min(ranks, self.norm_ranks or ranks)
        workload = replace(self.workload, ranks=min(sharing, self.workload.gather_ranks + 1))
        if self.one_kernel and sharing > self.workload.gather_ranks:
            # The arithmetic of gathered statistics, but sums travel, in float64.
            gathered = _events(replace(workload, gather_ranks=workload.ranks), self.gpu)
            events = [
                replace(event, kind="sum", num_bytes=2 * event.num_bytes) if event.kind == "gather" else event
                for event in gathered
            ]
        else:
            events = list(_events(workload, self.gpu))
        scale = self._scale()
        events = [
            replace(event, compute_s=scale * event.compute_s, weight_gradients_s=scale * event.weight_gradients_s)
            for event in events
        ]
        return [self._compress(event) for event in events] if self.compressed else events

    def _scale(self) -> float:
        if not self.step_s:
            return 1.0
        alone = _events(replace(self.workload, ranks=1), self.gpu)
        return self.step_s / sum(event.compute_s for event in alone)

    def _compress(self, event: Event) -> Event:
        """A bucket in bf16, rounded, divided and copied back by three kernels: 16 bytes per value read or written."""
        if event.kind != "bucket":
            return event
        extra_s = 4 * event.num_bytes / (self.gpu or H100).memory_bandwidth
        compute_s, num_bytes = event.compute_s + extra_s, event.num_bytes // 2
        return replace(event, compute_s=compute_s, num_bytes=num_bytes, launches=event.launches + 3)


@functools.cache
def _events(workload: Workload, gpu: Gpu | None) -> tuple[Event, ...]:
    return modelled_events(workload, gpu) if gpu else measured_events(workload)


def _with_network(scenario: Scenario, **changed: float) -> Scenario:
    return replace(scenario, network=replace(scenario.network, **changed))  # type: ignore[arg-type]


def _with_workload(scenario: Scenario, **changed: object) -> Scenario:
    return replace(scenario, workload=replace(scenario.workload, **changed))  # type: ignore[arg-type]


CHANGES: Mapping[str, Callable[[Scenario], Scenario]] = {
    "frozen batch norm": lambda s: _with_workload(s, norm="frozen"),
    "batch norm synchronised within each node": lambda s: replace(s, norm_ranks=s.network.gpus),
    "statistics gathered at any number of ranks": lambda s: _with_workload(s, gather_ranks=10**6),
    "batch norm's sums merged by one kernel": lambda s: replace(s, one_kernel=True),
    "weights' gradients computed while sums travel": lambda s: replace(s, late_weight_gradients=True),
    "half the latency": lambda s: _with_network(s, latency_scale=s.network.latency_scale / 2),
    "twice the network's bandwidth": lambda s: _with_network(s, node_bandwidth=2 * s.network.node_bandwidth),
    "one network card per node": lambda s: _with_network(s, node_bandwidth=s.network.node_bandwidth / s.network.gpus),
    "gradients in bf16": lambda s: replace(s, compressed=True),
    "CUDA graph (no launches)": lambda s: replace(s, launch_s=0.0),
    "launches take twice as long": lambda s: replace(s, launch_s=2 * s.launch_s),
    "twice the images per GPU": lambda s: _with_workload(s, images=2 * s.workload.images),
    "no stragglers": lambda s: replace(s, stragglers=NO_STRAGGLERS),
    "small sums waited for, by gloo": lambda s: replace(s, sums_ahead=False),
    "batch norm in DDP's process group": lambda s: replace(s, own_group=False),
}
