"""Taking back what a forward pass did to the buffers, where the update it was for turns out to be skipped.

A NaN that came by once would stay in the running statistics for ever.
"""

import torch
from torch import nn

_Copies = dict[torch.dtype, torch.Tensor]


@torch.no_grad()
def copy_buffers(module: nn.Module) -> _Copies:
    """Return all buffers of a module in one flat tensor per dtype."""
    return {dtype: torch.cat([b.flatten() for b in buffers]) for dtype, buffers in _by_dtype(module).items()}


@torch.no_grad()
def put_back(module: nn.Module, copies: _Copies, *, where: torch.Tensor) -> None:
    """Give a module's buffers the copied values if `where` (bool [] on their device) is true, unseen by the host."""
    for dtype, buffers in _by_dtype(module).items():
        now = torch.cat([b.flatten() for b in buffers])
        chosen = torch.where(where, copies[dtype], now).split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(chosen, buffers, strict=True)])


def _by_dtype(module: nn.Module) -> dict[torch.dtype, list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in module.buffers():
        groups.setdefault(buffer.dtype, []).append(buffer)
    return groups
