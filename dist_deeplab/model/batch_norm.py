"""Batch normalisation in three modes: synchronised over all ranks (see sync_batch_norm.py), frozen, or per rank.

All modes share `nn.BatchNorm2d`'s parameter and buffer names, so weights move freely between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_deeplab.errors import UserError
from dist_deeplab.model.sync_batch_norm import SyncBatchNorm

EPS = 1e-5  # DeepLab-v2 prototxt: batch_norm_param { eps: 1e-5 }
MOMENTUM = 0.1  # torch's default: the new statistics' share; the TensorFlow and Caffe versions keep 0.999 of the old

NormFactory = Callable[[int], _BatchNorm]


def norm_factory(
    mode: Literal["sync", "frozen", "local"], *, sync_bn: Literal["own", "torch"] = "own", accumulation: int = 1
) -> NormFactory:
    """Function that makes a normalisation layer from a number of channels.

    Args:
        mode: `sync`, `frozen` or `local`.
        sync_bn: implementation behind `sync`.
        accumulation: micro-batches of an optimizer step. Each moves the running statistics once, so their momentum is
            corrected to 1-(1-m)^(1/A): their time constant, in steps, is that of one large batch.

    Raises:
        ValueError: an unknown mode or implementation.
        UserError: torch's SyncBatchNorm where there is no GPU.
    """
    momentum = 1.0 - (1.0 - MOMENTUM) ** (1.0 / accumulation)
    if mode == "frozen":
        return partial(FrozenBatchNorm, eps=EPS)
    if mode == "local":
        return partial(LocalBatchNorm, eps=EPS, momentum=momentum)
    if mode != "sync" or sync_bn not in ("own", "torch"):
        raise ValueError(f"unknown batch norm {mode!r} ({sync_bn!r}); known: sync (own, torch), frozen, local")
    if sync_bn == "torch":
        if not torch.cuda.is_available():
            raise UserError("model.sync_bn=torch works on CUDA only and there is no GPU here; use model.sync_bn=own")
        return partial(nn.SyncBatchNorm, eps=EPS, momentum=momentum)
    return partial(SyncBatchNorm, eps=EPS, momentum=momentum)


def convolve_and_normalize(conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`norm(conv(x))`, float [B, C, H, W].

    In training a frozen batch norm goes into the convolution's weights: so it makes no pass over the activations,
    neither forward nor backward, and keeps none of them. Hooks of the two modules are not called then. Not in float16,
    whose range the gradient of such weights leaves where the variance is large.
    """
    if not (isinstance(norm, FrozenBatchNorm) and norm.training) or _runs_in_half(x):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), shift)


def _runs_in_half(x: torch.Tensor) -> bool:
    """Whether a convolution of `x` runs in float16 here."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) == torch.float16
    return x.dtype == torch.float16


class FrozenBatchNorm(nn.BatchNorm2d):
    """Normalises by stored statistics whatever `train()` says, and learns nothing: the paper's fine-tuning."""

    def __init__(self, num_features: int, eps: float = EPS) -> None:
        super().__init__(num_features, eps=eps)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self._cached: tuple[list[Any], tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [B, C, H, W] normalised by the stored statistics."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift [C] of what `forward` does to a channel: input * scale + shift.

        Computed once, and again after one of the four tensors has changed in place, moved or been replaced. (What no
        one notices is a write through `.data`, which leaves the version as it is.)
        """
        if torch.compiler.is_compiling():
            return self._compute_scale_and_shift()
        sources = (self.weight, self.bias, self.running_mean, self.running_var)
        state = [(tensor._version, tensor.device, tensor.dtype) for tensor in sources]  # type: ignore[union-attr]
        cached = self._cached
        if cached is None or cached[0] != state or any(a is not b for a, b in zip(cached[1], sources, strict=True)):
            result = self._compute_scale_and_shift()
            if type(result[0]) is not torch.Tensor or result[0].is_inference():  # while tracing; not for training
                return result
            self._cached = cached = state, sources, result
        return cached[2]

    @torch.no_grad()
    def _compute_scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, torch.addcmul(self.bias, self.running_mean, scale, value=-1)


class LocalBatchNorm(nn.BatchNorm2d):
    """Normalises by this rank's batch while training; one of no images passes and moves no statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [B, C, H, W] of the input's dtype."""
        if len(input) or not self.training:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
