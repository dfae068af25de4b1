"""What a forward pass changes in a network besides its output, copied and restored without a word to the host."""

import torch
from torch import nn

from dist_deeplab.model.batch_norm import FrozenBatchNorm


@torch.no_grad()
def copy_buffers(module: nn.Module) -> dict[torch.dtype, torch.Tensor]:
    """All buffers that a forward pass changes, in one flat tensor per dtype; not the statistics of frozen layers."""
    return {dtype: torch.cat([b.flatten() for b in buffers]) for dtype, buffers in _by_dtype(module).items()}


@torch.no_grad()
def restore_buffers(module: nn.Module, copies: dict[torch.dtype, torch.Tensor], *, where: torch.Tensor) -> None:
    """Give a module's buffers the copied values if `where` (bool [] on their device) is true, unseen by the host.

    Otherwise a NaN of a skipped update would stay in the running statistics.
    """
    for dtype, buffers in _by_dtype(module).items():
        now = torch.cat([b.flatten() for b in buffers])
        chosen = torch.where(where, copies[dtype], now).split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(chosen, buffers, strict=True)])


def _by_dtype(module: nn.Module) -> dict[torch.dtype, list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for layer in module.modules():
        # Written to in place, a frozen layer's statistics would be taken for new ones, its scale computed again.
        for buffer in () if isinstance(layer, FrozenBatchNorm) else layer.buffers(recurse=False):
            groups.setdefault(buffer.dtype, []).append(buffer)
    return groups
