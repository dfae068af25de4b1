"""Activation checkpointing that leaves batch-norm statistics alone (Chen et al. 2016, arXiv:1604.06174)."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dist_deeplab.model.batch_norm import FrozenBatchNorm


def recomputed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, of which only `x` is kept for the backward pass, which runs `block` a second time.

    The second run normalises by the same batch again but does not move the running statistics; its collectives (of a
    SyncBatchNorm) are called by every rank, in the same order. The block must not draw random numbers.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return contextlib.nullcontext(), _statistics_kept(block)

    output = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    assert isinstance(output, torch.Tensor)
    return output


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Let batch norm write its running statistics into temporary copies."""
    layers = [m for m in block.modules() if isinstance(m, _BatchNorm) and not isinstance(m, FrozenBatchNorm)]
    kept = [dict(layer._buffers) for layer in layers]
    for layer in layers:
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = buffer.clone() if buffer is not None else None
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update(buffers)
