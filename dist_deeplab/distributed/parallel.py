"""One function that makes a network trainable on this rank's device together with the other ranks."""

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_deeplab.distributed.process_group import DistEnv, backend_of, get_world_size
from dist_deeplab.distributed.replicas import check_replicas

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def prepare_model(
    model: nn.Module,
    env: DistEnv,
    *,
    channels_last: bool = True,
    compile: bool = False,
    compress_gradients: bool = False,
    static_graph: bool = False,
) -> nn.Module:
    """`model` on the rank's device, wrapped for DDP where there are other ranks.

    All ranks must hold the same weights already (same seed, same file): that is verified, not fixed.

    Args:
        model: the network as it is trained.
        env: this rank.
        channels_last: memory format of the weights, which the activations follow.
        compile: compile the network on its first step.
        compress_gradients: all-reduce the gradients in bf16.
        static_graph: promise DDP that every step uses the same parameters equally often. Its first backward then
            reduces all at the end and must not be inside `gradient_sync(enabled=False)`: the step's warm-up pass is it.

    Raises:
        TrainingError: the ranks' weights differ.
    """
    model = place_model(model, env.device, channels_last=channels_last)
    if compile:
        # In place, inside DDP: names of parameters stay. Not dynamic: an uneven split has two sizes of batches, and of
        # those torch knows no shapes after SyncBatchNorm's kernel.
        model.compile(dynamic=False)
    if env.world_size == 1:
        return model
    check_replicas(model)
    devices = [env.device] if env.device.type == "cuda" else None
    # Buffers (batch-norm statistics) are equal by construction or, with batch_norm=local, meant to differ.
    new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch >= 2.13
    options: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, static_graph=static_graph, **options
    )
    if compress_gradients:
        wrapped.register_comm_hook(None, _all_reduce_in_bf16)
    return wrapped


def separate_group(device: torch.device) -> "dist.ProcessGroup | None":
    """Another process group of all ranks, for collectives that must not queue up behind DDP's; None for one rank.

    It has the default group's time limit: NCCL's own is 10 minutes, and the main rank may draw or save for longer.
    """
    if get_world_size() == 1:
        return None
    assert dist.group.WORLD is not None
    limit = dist.group.WORLD._get_backend(device).options._timeout
    return dist.new_group(backend=backend_of(device), timeout=limit)


def _all_reduce_in_bf16(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks in bf16; torch's own hook for it refuses gloo."""
    gradient = bucket.buffer()
    rounded = gradient.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(rounded, async_op=True)
    return work.get_future().then(lambda done: gradient.copy_(done.value()[0]))


def place_model(model: ModuleT, device: torch.device, *, channels_last: bool = True) -> ModuleT:
    """`model` on `device`, in channels-last memory where wanted: tensor cores and CPU kernels like it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format)  # type: ignore[call-overload]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Context in which backward reduces gradients over the ranks, or (not enabled) leaves them local."""
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def share_buffers(model: nn.Module) -> None:
    """Give every rank the main rank's buffers: before evaluating or saving statistics that are kept per rank."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
