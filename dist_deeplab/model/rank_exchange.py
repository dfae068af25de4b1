"""What the ranks exchange in a synchronised layer (sync_batch_norm.py): values of all of them gathered, or summed."""

from typing import Any

import torch
import torch.distributed as dist

GATHER_RANKS = 8  # a node's: of more ranks, statistics are summed

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def is_alone() -> bool:
    """Whether there is no other rank to share statistics with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gathers() -> bool:
    """Whether statistics are gathered from all ranks, not summed over them."""
    return dist.get_world_size() <= GATHER_RANKS


def total(tensor: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
    """The sum over all ranks; on few CPU ranks gathered and added in rank order, which gloo does in half the time."""
    if tensor.is_cuda or not gathers():
        return all_reduce(tensor, group)
    return gather(tensor.flatten(), group).view(-1, *tensor.shape).sum(0)


def gather(tensor: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
    """A flat tensor's values of all ranks, one rank after the other."""
    if torch.compiler.is_compiling():
        return _functional().all_gather_tensor(tensor, 0, group or dist.group.WORLD)
    gathered = tensor.new_empty(dist.get_world_size() * tensor.numel())
    _all_gather(gathered, tensor, group=group)
    return gathered


def all_reduce(tensor: torch.Tensor, group: "dist.ProcessGroup | None") -> torch.Tensor:
    """The sum over all ranks."""
    if torch.compiler.is_compiling():
        return _functional().all_reduce(tensor, "sum", group or dist.group.WORLD)
    dist.all_reduce(tensor, group=group)
    return tensor


def _functional() -> Any:
    """torch's collectives that can be compiled; the module's name says that it may move."""
    import torch.distributed._functional_collectives as functional

    return functional
