"""Batch normalisation in three modes: synchronised over all ranks (CUDA and CPU), frozen, or per rank.

`SyncBatchNorm` on n ranks equals one `nn.BatchNorm2d` on the concatenated batch: output, gradients and running
statistics, with per-rank batches of unequal size too. torch.nn.SyncBatchNorm does the same on CUDA but refuses CPU
tensors. All modes share `nn.BatchNorm2d`'s parameter and buffer names, so weights move freely between them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_deeplab.errors import UserError

EPS = 1e-5  # DeepLab-v2 prototxt: batch_norm_param { eps: 1e-5 }
MOMENTUM = 0.1  # torch's default: the new statistics' share; the TensorFlow and Caffe versions keep 0.999 of the old

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13

NormFactory = Callable[[int], _BatchNorm]


def norm_factory(
    mode: Literal["sync", "frozen", "local"], *, sync_bn: Literal["own", "torch"] = "own", accumulation: int = 1
) -> NormFactory:
    """Return what makes a normalisation layer from a number of channels.

    Args:
        mode: `sync`, `frozen` or `local`.
        sync_bn: implementation behind `sync`.
        accumulation: micro-batches of an optimizer step. The running statistics move once each, so their momentum is
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


def is_alone() -> bool:
    """Return whether there is no other rank to share statistics with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def convolve_and_normalize(conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return `norm(conv(x))`, float [B, C, H, W].

    In training a frozen batch norm goes into the convolution's weights: so it makes no pass over the activations,
    neither forward nor backward, and keeps none of them. Hooks of the two modules are not called then. Not in float16,
    whose range the gradient of such weights leaves where the variance is large.
    """
    if not (isinstance(norm, FrozenBatchNorm) and norm.training) or _runs_in_half(x):
        return norm(conv(x))
    scale, shift = norm.line()
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), shift)


def _runs_in_half(x: torch.Tensor) -> bool:
    """Return whether a convolution of `x` runs in float16 here."""
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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return float [B, C, H, W] normalised by the stored statistics."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def line(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and shift [C] of what `forward` does to a channel: input * scale + shift."""
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, torch.addcmul(self.bias, self.running_mean, scale, value=-1)


class LocalBatchNorm(nn.BatchNorm2d):
    """Normalises by this rank's batch while training; one of no images passes and moves no statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return float [B, C, H, W] of the input's dtype."""
        if len(input) or not self.training:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class SyncBatchNorm(nn.BatchNorm2d):
    """Normalises by statistics over the batches of all ranks while training, by stored ones in eval mode.

    One collective in forward and one in backward; every rank must call it equally often. Memory format and dtype of
    the input are kept; statistics are at least float32.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return float [B, C, H, W] of the input's dtype.

        Raises:
            ValueError: in training, fewer than two values per channel over all ranks.
        """
        if not self.training or is_alone():
            return super().forward(input)
        output, mean, var, count = _SyncNormalize.apply(input, self.weight, self.bias, self.eps)
        self._update_running(mean, var, count)
        return output

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class _SyncNormalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with mean and var over all ranks.

    The heavy passes are torch's own fused kernels: `batch_norm_update_stats` for the moments, evaluation-mode batch
    norm for the normalisation, and its backward for the two reductions.
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, var, count = _global_moments(input)
        output = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps) if input.numel() else input.clone()
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        input, weight, mean, var, count = ctx.saved_tensors
        if input.numel():
            grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
        else:
            grad_input, grad_weight, grad_bias = torch.zeros_like(input), torch.zeros_like(mean), torch.zeros_like(mean)
        # d loss / d input of (x - mean) * invstd, where mean and var depend on every x:
        #   weight * invstd * (grad - sum(grad) / n - xhat * sum(grad * xhat) / n)      (Ioffe and Szegedy 2015, sec. 3)
        # The first term is there; the other two are again a normalisation of x, with other weight and bias.
        sums = _all_reduce(torch.stack([grad_weight, grad_bias]))
        slope = weight * torch.rsqrt(var + ctx.eps) / count.to(sums.dtype)
        if input.numel():
            grad_input -= F.batch_norm(input, mean, var, slope * sums[0], slope * sums[1], False, 0.0, ctx.eps)
        return grad_input, grad_weight, grad_bias, None


def _global_moments(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and biased variance [C] over all ranks, float32 (float64 for such input), and the count, float64 [].

    Each rank's (mean, var, n) are gathered and merged in rank order, so all ranks hold the same bits; merging moments
    instead of sums of squares avoids cancellation (Chan, Golub and LeVeque 1983).
    """
    channels = input.shape[1]
    wide = input if input.dtype == torch.float64 else input.float()
    local = torch.zeros(2 * channels + 1, dtype=wide.dtype, device=input.device)
    if input.numel():
        local[:channels], local[channels:-1] = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
        local[-1] = input.numel() // channels
    gathered = _gather(local)
    means, variances, counts = gathered.view(-1, local.numel()).double().split([channels, channels, 1], dim=1)
    count = counts.sum()
    if input.numel() <= channels and count < 2:  # only ranks with less than two values need to look (host waits)
        raise ValueError("expected more than one value per channel over all ranks when training")
    mean = (means * counts).sum(0) / count
    var = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean.to(wide.dtype), var.to(wide.dtype), count


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat tensor's values of all ranks, one rank after the other."""
    if torch.compiler.is_compiling():
        return _functional().all_gather_tensor(tensor, 0, dist.group.WORLD)
    gathered = tensor.new_empty(dist.get_world_size() * tensor.numel())
    _all_gather(gathered, tensor)
    return gathered


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks."""
    if torch.compiler.is_compiling():
        return _functional().all_reduce(tensor, "sum", dist.group.WORLD)
    dist.all_reduce(tensor)
    return tensor


def _functional() -> Any:
    """Return torch's collectives that can be compiled; the module's name says that it may move."""
    import torch.distributed._functional_collectives as functional

    return functional
