"""Synchronised batch norm, forward and backward: ours, torch.nn.SyncBatchNorm, and BatchNorm2d as the limit.

All layers of a backbone, each on an input of the shape that it gets there. Under torchrun on real ranks; as a single
process the synchronised path is taken all the same, with a process group of one rank, so that what it costs beside the
network shows. torch.nn.SyncBatchNorm refuses CPU tensors: its row is there on GPUs only.

    python tools/benchmark.py batch_norm
    torchrun --standalone --nproc_per_node 2 tools/benchmark.py batch_norm
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncNormalize

from benchmarks.harness import Report, Row, interleave, ratio_column, synchronizer
from dist_deeplab.distributed.process_group import DistEnv, backend_of, process_group
from dist_deeplab.logs import format_count
from dist_deeplab.model import batch_norm, rank_exchange, sync_batch_norm
from dist_deeplab.model.deeplabv2 import DeepLabV2

SUMMARY = "synchronised batch norm against torch's and against BatchNorm2d"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet101" if on_gpu else "resnet_tiny", help="default: %(default)s")
    parser.add_argument("--crop", type=int, default=321 if on_gpu else 65, help="pixels, 8k+1; default: %(default)s")
    parser.add_argument("--images", type=int, default=10 if on_gpu else 4, help="images a rank; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="timed passes of each; default: %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    env = DistEnv.from_environ()
    with process_group(env), one_rank_group(env):
        return measure(arguments, env)


def measure(arguments: argparse.Namespace, env: DistEnv) -> Report:
    """The table; every rank calls it."""
    device = env.device
    shapes = layer_shapes(arguments.backbone, arguments.images, arguments.crop)
    dtype = DTYPES[arguments.dtype]
    memory_format = torch.channels_last
    inputs = [torch.randn(s, device=device, dtype=dtype).to(memory_format=memory_format) for s in shapes]
    makers: dict[str, Callable[[int], nn.Module]] = {
        "BatchNorm2d": nn.BatchNorm2d,
        "ours": sync_batch_norm.SyncBatchNorm,
    }
    if device.type == "cuda":
        makers |= {"ours_portable": PortableSync, "torch_sync": TorchSync}
    competitors = {name: Pass([make(s[1]).to(device) for s in shapes], inputs) for name, make in makers.items()}
    timings = interleave(competitors, rounds=arguments.rounds, warmup=3, synchronize=synchronizer(device))
    rows: list[Row] = [
        {
            "what": name,
            "ms": 1e3 * timing.median,
            "spread": timing.spread,
            "us_a_layer": 1e6 * timing.median / len(shapes),
        }
        for name, timing in timings.items()
    ]
    ratio_column(rows, of="ms", to="BatchNorm2d", name="x_BatchNorm2d")
    if device.type == "cuda":
        ratio_column(rows, of="ms", to="torch_sync", name="x_torch_sync")
    layers, ranks = format_count(len(shapes), "layer"), format_count(env.world_size, "rank")
    notes = [f"{layers} of {arguments.backbone}, {arguments.dtype}, channels-last, {ranks}"]
    if device.type != "cuda":
        notes.append("torch.nn.SyncBatchNorm refuses CPU tensors and is not in the table")
    return Report("forward and backward of all batch norm layers", rows, notes)


def layer_shapes(backbone: str, images: int, crop: int) -> list[tuple[int, int, int, int]]:
    """The input shape of every batch norm layer, in order."""
    shapes: list[tuple[int, int, int, int]] = []
    with torch.device("meta"):
        net = DeepLabV2(backbone, 2, norm=batch_norm.norm_factory("local")).eval()
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        net(torch.empty(images, 3, crop, crop))
    return shapes


class Pass:
    """Forward and backward of each layer by itself."""

    def __init__(self, layers: list[nn.Module], inputs: list[torch.Tensor]) -> None:
        self.layers = [layer.train() for layer in layers]
        self.inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]

    def __call__(self) -> None:
        for layer, x in zip(self.layers, self.inputs, strict=True):
            y = layer(x)
            y.backward(y.detach())


class PortableSync(sync_batch_norm.SyncBatchNorm):
    """Ours on a GPU the way a CPU and a compiled graph take, without torch's kernels for it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalised input."""
        with mock.patch.object(sync_batch_norm, "has_kernels", return_value=False):
            return super().forward(input)


class TorchSync(nn.SyncBatchNorm):
    """torch's, on its synchronised path at world size 1 too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalised input."""
        group = dist.group.WORLD
        return TorchSyncNormalize.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            group,
            dist.get_world_size(),
        )


@contextlib.contextmanager
def one_rank_group(env: DistEnv) -> Iterator[None]:
    """Where there is no other rank: hold a process group of one open, and let our layers take it for one of many."""
    if env.world_size > 1:
        yield
        return
    dist.init_process_group(backend_of(env.device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.object(rank_exchange, "is_alone", return_value=False):
            yield
    finally:
        dist.destroy_process_group()
