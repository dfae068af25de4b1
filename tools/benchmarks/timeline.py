"""When a network's forward and backward have something to communicate, measured on one rank without communication."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from benchmarks.network import Event
from dist_deeplab.data.loader import Batch
from dist_deeplab.distributed.parallel import place_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model import batch_norm, sync_batch_norm
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import cross_entropy_sum, sample_label


class Clock:
    """Marks moments on the device, and tells the seconds between them once all is done."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, int, Any]] = []

    def mark(self, kind: str, num_bytes: int = 0) -> None:
        """Remember this moment."""
        if self.on_gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((kind, num_bytes, moment))

    def events(self) -> list[Event]:
        """Every mark but the first as an event."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found = []
        for (_, _, before), (kind, num_bytes, moment) in zip(self.marks, self.marks[1:]):
            seconds = before.elapsed_time(moment) / 1e3 if self.on_gpu else moment - before
            found.append(Event(kind, seconds, num_bytes))
        return found


def median_events(runs: list[list[Event]]) -> list[Event]:
    """The events of one rank, each with the median compute before it."""
    return [replace(one[0], compute_s=statistics.median(event.compute_s for event in one)) for one in zip(*runs)]


def slowest_events(runs_of_ranks: list[list[list[Event]]]) -> list[Event]:
    """The events of ranks that wait for each other at each: the slowest's compute, as a mean over the runs."""
    together = zip(*(zip(*runs) for runs in runs_of_ranks))  # event by event: (rank, run)
    return [
        replace(ranks[0][0], compute_s=statistics.mean(max(e.compute_s for e in one) for one in zip(*ranks)))
        for ranks in together
    ]


class NoOthers:
    """The part of `torch.distributed` that SyncBatchNorm uses, as if this rank were all there are."""

    @staticmethod
    def get_world_size() -> int:
        """1: this rank alone."""
        return 1

    @staticmethod
    def all_reduce(tensor: torch.Tensor, group: object) -> None:
        """Leave the tensor as it is: no rank adds to it."""


@contextlib.contextmanager
def synchronised_alone() -> Iterator[None]:
    """Let SyncBatchNorm do the arithmetic of several ranks, which is more than BatchNorm2d's, without messages."""
    with (
        mock.patch.object(sync_batch_norm, "is_alone", return_value=False),
        mock.patch.object(sync_batch_norm, "dist", NoOthers),
        mock.patch.object(
            sync_batch_norm, "_all_gather", lambda output, tensor, group: output.copy_(tensor.view_as(output))
        ),
    ):
        yield


def measure_runs(
    backbone: str, batch: Batch, num_classes: int, *, synchronised: bool, repeats: int = 5
) -> list[list[Event]]:
    """For each of `repeats` runs, the events of a micro-batch's forward and backward, without communication.

    Where batch norm would communicate is marked; `synchronised`: it does the arithmetic that goes with that too. The
    last event is `nothing`.
    """
    with synchronised_alone() if synchronised else contextlib.nullcontext():
        return _measure_runs(backbone, batch, num_classes, norm="sync" if synchronised else "local", repeats=repeats)


def _measure_runs(
    backbone: str, batch: Batch, num_classes: int, *, norm: Literal["sync", "local"], repeats: int
) -> list[list[Event]]:
    device = DistEnv().device
    torch.manual_seed(0)
    net = DeepLabV2(backbone, num_classes, norm=batch_norm.norm_factory(norm))
    model = place_model(MultiScale(net), device).train()
    clock = Clock(device)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(_marker(clock, "gather", 4 * (2 * layer.num_features + 1)))
            layer.register_forward_hook(_output_marker(clock, "reduce", 4 * 2 * layer.num_features))
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(_marker(clock, "gradient", 4 * parameter.numel()))
    runs = []
    for repeat in range(repeats + 2):
        net.zero_grad()
        clock.marks.clear()
        clock.mark("start")
        image = CAFFE.normalize(batch.image.to(device), batch.content)
        logits = model(image)["scale_1"]
        label = sample_label(batch.label, (logits.shape[2], logits.shape[3])).to(device)
        cross_entropy_sum(logits, label, 255).backward()
        clock.mark("nothing")
        if repeat >= 2:
            runs.append(clock.events())
    return runs


def _marker(clock: Clock, kind: str, num_bytes: int) -> Callable[..., None]:
    return lambda *_: clock.mark(kind, num_bytes)


def _output_marker(clock: Clock, kind: str, num_bytes: int) -> Callable[..., None]:
    """Mark when backward reaches the layer: its sums follow. (A full backward hook forbids the in-place ReLU.)"""

    def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        output.register_hook(lambda grad: clock.mark(kind, num_bytes))

    return hook
