"""The parts of a step on gloo ranks of one machine, measured apart: compute without communication, and the reverse."""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from benchmarks.events import DeviceClock, Workload, forward_and_backward, marked_batch_norm
from benchmarks.network import Collective, Measured
from benchmarks.timeline import Event
from dist_deeplab.config import OptimConfig
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all
from dist_deeplab.distributed.rank_sums import RankSums
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.rank_exchange import _all_gather
from dist_deeplab.training.optim import build_optimizer

_IN_A_ROW = 5  # steps that are timed together
_SMALL_SUMS = [0.0] * 6  # what the ranks agree on per step
_SMALL_SUMS_KEY = ("all_reduce", 8 * len(_SMALL_SUMS))


@dataclass
class Replica:
    """A network that DDP wraps, with its optimizer."""

    model: nn.Module
    optimizer: Optimizer
    sums: RankSums

    @classmethod
    def of(cls, net: DeepLabV2, env: DistEnv) -> "Replica":
        """A copy of `net`, prepared as training does it."""
        net = copy.deepcopy(net)
        model = prepare_model(MultiScale(net), env).train()
        return cls(model, build_optimizer(net, OptimConfig()), RankSums(env.device))

    def step(self, batch: Batch, wait: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, update; `wait` is called between the last two."""
        self.optimizer.zero_grad()
        forward_and_backward(self.model, batch, torch.device("cpu"))
        wait()
        self.optimizer.step()

    def whole_steps(self, batch: Batch) -> float:
        """Seconds of a step with all its communication: of some in a row, as a run makes them.

        Ranks leave a barrier at different times, which would count in each step if each began with one.
        """
        dist.barrier()
        started = time.perf_counter()
        for _ in range(_IN_A_ROW):
            pending = self.sums.start(_SMALL_SUMS)
            self.step(batch)
            pending.read()
        return (time.perf_counter() - started) / _IN_A_ROW


@dataclass(frozen=True)
class ComputeRun:
    """One rank's step without communication: its events in processor time, and seconds of processor and clock."""

    events: list[Event]
    processor_s: float
    seconds: float

    @classmethod
    def of_all_ranks(cls, runs: "Sequence[ComputeRun]") -> "list[tuple[ComputeRun, ...]]":
        """For each of this rank's runs, those of all ranks at the same time; every rank calls it."""
        ranks = [
            [cls([Event(**event) for event in run.pop("events")], **run) for run in plain]
            for plain in gather_to_all([asdict(run) for run in runs])
        ]
        return list(zip(*ranks, strict=True))


class Silent:
    """A replica whose collectives return at once, and are marked."""

    def __init__(self, net: DeepLabV2, env: DistEnv, workload: Workload) -> None:
        self.replica, self.workload = Replica.of(net, env), workload
        self.clock = DeviceClock(torch.device("cpu"), time.thread_time)
        self.replica.model.register_comm_hook(None, self._reduce)  # type: ignore[operator]

    def run(self, batch: Batch) -> ComputeRun:
        """A step of this rank while all others compute one too."""
        dist.barrier()
        started, processor_started = time.perf_counter(), time.thread_time()
        with marked_batch_norm(self.clock.mark, self.workload):
            self.clock.start()
            self.replica.step(batch, wait=lambda: self.clock.mark("wait", 0))
            self.clock.mark("end", 0)
        processor_s, seconds = time.thread_time() - processor_started, time.perf_counter() - started
        return ComputeRun(self.clock.events(), processor_s, seconds)

    def _reduce(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.clock.mark("bucket", bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done


def cores_received(runs: Sequence[ComputeRun], cores: int) -> float:
    """Cores that these ranks, which computed at the same time, would get if they wanted all.

    The shares of ranks that begin or end at different times add up to more than there is.
    """
    received = sum(run.processor_s / run.seconds for run in runs)
    return min(cores, received * max(1.0, cores / len(runs)))


def common_events(runs: Sequence[ComputeRun], capacity: float) -> list[Event]:
    """The events of ranks that meet at each: processor seconds that one rank may take until the last has arrived.

    With a core for each that is the slowest rank's time. Where ranks share cores, it is their mean, or the slowest's
    time at the speed of a whole core where that is longer.
    """
    share = min(1.0, capacity / len(runs))
    events = []
    for together in zip(*(run.events for run in runs), strict=True):
        seconds = [event.compute_s for event in together]
        compute_s = max(statistics.mean(seconds), share * max(seconds))
        events.append(Event(together[0].kind, compute_s, together[0].num_bytes))
    return events


@dataclass
class Replay:
    """Makes a step's collectives in its order, each waited for, with other compute in between.

    Before each collective a rank uses the processor for as long as it did in its own step. So ranks arrive as far apart
    as in a step, and a core is as likely to be busy with other work when one of them wakes up.

    rows: (kind, bytes, arrival, return, processor seconds of all threads) of each collective.
    """

    group: "dist.ProcessGroup | None"
    ranks: int
    sums: RankSums
    rows: list[tuple[str, int, float, float, float]] = field(default_factory=list)

    def run(self, compute: ComputeRun) -> None:
        """The collectives of one step; every rank calls it."""
        dist.barrier()
        self._time(*_SMALL_SUMS_KEY, lambda: self.sums.start(_SMALL_SUMS).read())
        for event in compute.events:
            use_processor(event.compute_s)
            if event.num_bytes:
                function, call = self._call(event.kind, event.num_bytes)
                self._time(function, event.num_bytes, call)

    def network(self) -> Measured:
        """The mean cost of each collective, from the last rank's arrival to the last one's return; every rank calls it.

        A mean, since a step has many of them: where the cores have other work, now and then one waits for a core.
        """
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for ranks in zip(*gather_to_all(self.rows), strict=True):
            seconds = max(done for *_, done, _ in ranks) - max(arrived for _, _, arrived, *_ in ranks)
            function, num_bytes, *_ = ranks[0]
            found.setdefault((function, num_bytes), []).append((seconds, sum(used for *_, used in ranks)))
        means = {key: [statistics.mean(values) for values in zip(*pairs)] for key, pairs in found.items()}
        return Measured({key: Collective(mean_s, 0.0, used / mean_s) for key, (mean_s, used) in means.items()})

    def small_sums(self, network: Measured) -> Collective:
        """Their cost."""
        return network.costs[_SMALL_SUMS_KEY]

    def _call(self, kind: str, num_bytes: int) -> tuple[str, Callable[[], object]]:
        tensor = torch.zeros(num_bytes // 4)
        if kind == "gather":
            gathered = torch.zeros(self.ranks * len(tensor))
            return "all_gather", functools.partial(_all_gather, gathered, tensor, group=self.group)
        group = self.group if kind == "sum" else None
        return "all_reduce", functools.partial(dist.all_reduce, tensor, group=group)

    def _time(self, function: str, num_bytes: int, call: Callable[[], object]) -> None:
        processor, arrived = time.process_time(), time.perf_counter()
        call()
        self.rows.append((function, num_bytes, arrived, time.perf_counter(), time.process_time() - processor))


def use_processor(seconds: float) -> None:
    """Compute something for that long, in processor time."""
    a = torch.ones(64, 64)
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        a @ a
