"""When a step has something to communicate, and what it computes in between: on a modelled GPU, or on this device."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from benchmarks.modelled_gpu import Gpu, GpuModel
from benchmarks.step import NUM_CLASSES, draw_batches
from benchmarks.timeline import Event, bucketed
from dist_deeplab.config import OptimConfig
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.parallel import place_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model import rank_exchange, sync_batch_norm
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import cross_entropy_sum, sample_label
from dist_deeplab.training.optim import build_optimizer

Mark = Callable[[str, int], None]
Norm = Literal["sync", "frozen", "local"]


@dataclass(frozen=True)
class Workload:
    """What one rank computes in a step of one micro-batch.

    ranks: number of ranks, on which batch norm's arithmetic depends; 1 has nothing to communicate.
    gather_ranks: up to which number of ranks batch norm gathers statistics; beyond it sums them.
    """

    backbone: str
    crop: int
    images: int
    norm: Norm
    ranks: int = 1
    gather_ranks: int = rank_exchange.GATHER_RANKS


def modelled_events(workload: Workload, gpu: Gpu) -> tuple[Event, ...]:
    """The step's events on `gpu`, with launches, from a run of the real code on tensors without memory."""
    clock = ModelClock(GpuModel(gpu))
    device = torch.device("meta")
    with (
        mock.patch.object(sync_batch_norm, "has_kernels", return_value=True),
        mock.patch.object(torch.Tensor, "is_cuda", True),  # of two implementations choose the one for GPUs
        clock.model,
    ):
        step = build_step(workload, clock.mark, device, update=clock.update)
        with marked_batch_norm(clock.collective, workload):
            step()  # in which frozen layers compute their scales
            clock.reset()
            step()
    return tuple(bucketed(clock.events))


def measured_events(workload: Workload, *, repeats: int = 5) -> tuple[Event, ...]:
    """The step's events on this process's device, each with the median compute; launches are not counted.

    On a GPU whose host can't keep up the time between launches is in it.
    """
    clock = DeviceClock(DistEnv().device)
    step = build_step(workload, clock.mark, clock.device)
    runs = []
    with marked_batch_norm(clock.mark, workload):
        for repeat in range(repeats + 2):
            clock.start()
            step()
            if repeat >= 2:
                runs.append(clock.events())
    return tuple(bucketed(median_events(runs)))


def median_events(runs: Sequence[Sequence[Event]]) -> list[Event]:
    """The events of one rank, each with the median compute before it."""
    return [replace(one[0], compute_s=statistics.median(event.compute_s for event in one)) for one in zip(*runs)]


def build_step(
    workload: Workload, mark: Mark, device: torch.device, update: Callable[[Any], object] = SGD.step
) -> Callable[[], None]:
    """A step of one rank, from normalising to the update, that marks gradients, the end of backward and its own end."""
    torch.manual_seed(0)
    with torch.device(device) if device.type == "meta" else contextlib.nullcontext():
        net = DeepLabV2(workload.backbone, NUM_CLASSES, norm=norm_factory(workload.norm))
    model = place_model(MultiScale(net), device).train()
    optimizer = build_optimizer(net, OptimConfig())
    [batch] = draw_batches(workload.images, 1, workload.crop)
    if workload.ranks > 1:
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: mark("gradient", 4 * p.numel()))

    def step() -> None:
        optimizer.zero_grad()
        forward_and_backward(model, batch, device)
        mark("wait", 0)
        update(optimizer)
        mark("end", 0)

    return step


def forward_and_backward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    """Gradients of the summed loss of a batch."""
    logits = model(CAFFE.normalize(batch.image.to(device), batch.content))["scale_1"]
    label = sample_label(batch.label, (logits.shape[2], logits.shape[3])).to(device)
    cross_entropy_sum(logits, label, 255).backward()


@contextlib.contextmanager
def marked_batch_norm(mark: Mark, workload: Workload) -> Iterator[None]:
    """Let synchronised batch norm do the arithmetic of `workload.ranks` ranks, but mark its collectives instead.

    Each other rank's statistics are as this one's.
    """

    class NoOthers:
        """The part of `torch.distributed` that SyncBatchNorm uses."""

        @staticmethod
        def get_world_size() -> int:
            return workload.ranks

        @staticmethod
        def all_reduce(tensor: torch.Tensor, group: object) -> None:
            mark("sum", tensor.nbytes)

    def gather(output: torch.Tensor, tensor: torch.Tensor, group: object) -> None:
        mark("gather", tensor.nbytes)
        if tensor.device.type != "meta":
            output.view(workload.ranks, -1).copy_(tensor.flatten())

    with (
        mock.patch.object(rank_exchange, "is_alone", return_value=workload.ranks == 1),
        mock.patch.object(rank_exchange, "dist", NoOthers),
        mock.patch.object(rank_exchange, "GATHER_RANKS", workload.gather_ranks),
        mock.patch.object(rank_exchange, "_all_gather", gather),
    ):
        yield


@dataclass
class ModelClock:
    """Turns marks into events with the modelled seconds and launches since the mark before."""

    model: GpuModel
    events: list[Event] = field(default_factory=list)

    def reset(self) -> None:
        """Forget all that was."""
        self.events.clear()
        self.model.reset()

    def mark(self, kind: str, num_bytes: int) -> None:
        """An event at this moment; DDP copies each gradient into its bucket first."""
        if kind == "gradient":
            self.model.add(2 * num_bytes / self.model.gpu.memory_bandwidth)
        model = self.model
        self.events.append(Event(kind, model.seconds, num_bytes, model.launches, model.weight_gradients_s))
        self.model.reset()

    def update(self, optimizer: Optimizer) -> None:
        """Fused SGD with momentum, which torch refuses on meta tensors: five values per weight read or written."""
        num_values = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        self.model.add(5 * 4 * num_values / self.model.gpu.memory_bandwidth)

    def collective(self, kind: str, num_bytes: int) -> None:
        """An event whose collective the host launches too."""
        self.model.launches += 1
        self.mark(kind, num_bytes)


@dataclass
class DeviceClock:
    """Marks moments on a device, and gives the seconds between them once all is done.

    timer: seconds, where the device is the CPU.
    """

    device: torch.device
    timer: Callable[[], float] = time.perf_counter
    marks: list[tuple[str, int, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Forget all marks; the first event begins here."""
        self.marks.clear()
        self.mark("start", 0)

    def mark(self, kind: str, num_bytes: int) -> None:
        """Remember this moment."""
        if self.device.type == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = self.timer()
        self.marks.append((kind, num_bytes, moment))

    def events(self) -> list[Event]:
        """Every mark but the first as an event."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        found = []
        for (_, _, before), (kind, num_bytes, moment) in zip(self.marks, self.marks[1:]):
            found.append(Event(kind, before.elapsed_time(moment) / 1e3 if on_gpu else moment - before, num_bytes))
        return found
