"""What a step costs each rank as the machine grows: 8 to 1,024 ranks simulated in one process.

torch's fake process group has the size and does nothing, so what is measured is what the host does and what would
travel: collectives and bytes per step of synchronised batch norm, and the host's time for forward and backward. Columns
that stay flat are the goal; statistics gathered up to 8 ranks are summed beyond, so 8 and 64 may differ. Then, each in
a process of its own, the start of a run that resumes, up to its first batch (see start_up.py).

--samples: instead, the time to the first batch, memory and checkpoint of sets of N samples (see set_sizes.py).
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import set_sizes
from benchmarks.harness import Report, Row
from benchmarks.start_up import in_new_process, saved_run, start
from dist_deeplab.model import rank_exchange
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale

SUMMARY = "cost of a step per rank at 8 to 1,024 simulated ranks"
NUM_CLASSES = 21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="resnet_tiny", help="default: %(default)s")
    parser.add_argument("--crop", type=int, default=65, help="pixels, 8k+1; default: %(default)s")
    parser.add_argument("--images", type=int, default=2, help="per rank; default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 1024], help="default: 8 64 512 1024")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; default: %(default)s")
    set_sizes.add_arguments(parser)


def run(arguments: argparse.Namespace) -> Report:
    """Measure every number of ranks in turn, or the sets of --samples."""
    if arguments.samples is not None:
        return set_sizes.run(arguments)
    with saved_run(arguments) as overrides:
        rows = [
            measure(ranks, arguments) | in_new_process(partial(start, overrides, ranks)) for ranks in arguments.ranks
        ]
    notes = [
        "gradients come on top: DDP all-reduces 4 bytes per parameter, at any number of ranks",
        "collectives, received and host: of batch norm in a step; received is what a rank takes in, with a ring's "
        "all-gather (n - 1 parts) and all-reduce (twice the tensor)",
    ]
    notes.append(
        "start: of rank 0, which resumes, up to its first batch; its peak memory, and what collectives bring it"
    )
    return Report(f"{arguments.backbone}, crop {arguments.crop}, as the ranks grow", rows, notes)


def measure(ranks: int, arguments: argparse.Namespace) -> Row:
    """Collectives, bytes and host time of a step with synchronised batch norm among `ranks` ranks."""
    torch.manual_seed(0)
    model = MultiScale(DeepLabV2(arguments.backbone, NUM_CLASSES, norm=norm_factory("sync"))).train()
    image = torch.randn(arguments.images, 3, arguments.crop, arguments.crop)
    with fake_group(ranks), counted(ranks) as counts:
        seconds = []
        for _ in range(arguments.rounds + 1):
            counts.clear()
            started = time.perf_counter()
            model(image)["scale_1"].square().sum().backward()
            seconds.append(time.perf_counter() - started)
    return {
        "ranks": ranks,
        "collectives": len(counts),
        "received_kb": sum(counts) / 1e3,
        "host_ms": 1e3 * statistics.median(seconds[1:]),
    }


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of that size whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def counted(ranks: int) -> Iterator[list[float]]:
    """Bytes that a rank would receive, for each collective of batch norm; every rank's part is this one's."""
    counts: list[float] = []

    def gather(output: torch.Tensor, tensor: torch.Tensor, group: object) -> None:
        counts.append((ranks - 1) * tensor.nbytes)
        output.copy_(tensor.repeat(ranks))

    def reduce(tensor: torch.Tensor, group: object) -> torch.Tensor:
        counts.append(2 * tensor.nbytes * (ranks - 1) / ranks)
        return tensor.mul_(ranks)

    with (
        mock.patch.object(rank_exchange, "_all_gather", gather),
        mock.patch.object(rank_exchange, "all_reduce", reduce),
    ):
        yield counts
