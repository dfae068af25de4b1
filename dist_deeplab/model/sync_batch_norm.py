"""Batch norm over the batches of all ranks, on CUDA and CPU.

On n ranks `SyncBatchNorm` equals one `nn.BatchNorm2d` on the concatenated batch: output, gradients and running
statistics, with per-rank batches of unequal size too. torch.nn.SyncBatchNorm does the same on CUDA but refuses CPU
tensors, makes the host wait in each layer, and cannot be compiled.

There are two ways to the same result. `_SyncNormalize` is made of operators that every device has and that can be
compiled. `_SyncNormalizeByKernels` has a third of the launches: torch's own CUDA kernels for this very purpose.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

_NOTHING = 1e-30  # the number of values of a rank without images

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


def is_alone() -> bool:
    """Return whether there is no other rank to share statistics with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def has_kernels(input: torch.Tensor) -> bool:
    """Return whether torch's kernels for synchronised batch norm can be used on `input` here."""
    return input.is_cuda and not torch.compiler.is_compiling()


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
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if has_kernels(input):
            running = self.running_mean, self.running_var
            return _SyncNormalizeByKernels.apply(input, self.weight, self.bias, *running, self.momentum, self.eps)
        output, mean, var, count = _SyncNormalize.apply(input, self.weight, self.bias, self.eps)
        self._update_running(mean, var, count)
        return output

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


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
        slope, offset = sums * (weight * torch.rsqrt(var + ctx.eps) / count)
        if input.numel():
            grad_input -= F.batch_norm(input, mean, var, slope, offset, False, 0.0, ctx.eps)
        return grad_input, grad_weight, grad_bias, None


def _global_moments(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean and biased variance [C] and the count [] over all ranks, float32 (float64 for such input).

    Each rank's (mean, var, n) are gathered and merged in rank order, so all ranks hold the same bits; merging moments
    instead of sums of squares avoids cancellation (Chan, Golub and LeVeque 1983).
    """
    channels = input.shape[1]
    wide = input if input.dtype == torch.float64 else input.float()
    if input.numel():
        mean, var = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
        local = torch.cat([mean, var, mean.new_full((1,), input.numel() // channels)])
    else:
        local = wide.new_zeros(2 * channels + 1)
    rows = _gather(local).view(-1, local.numel()).double()  # a rank each
    means, variances, counts = rows.split([channels, channels, 1], dim=1)
    count = counts.sum()
    _require_two_values(input, counts)
    shares = counts / count
    mean = (means * shares).sum(0)
    distance = means - mean
    var = (torch.addcmul(variances, distance, distance) * shares).sum(0)
    return mean.to(wide.dtype), var.to(wide.dtype), count.to(wide.dtype)


def _require_two_values(input: torch.Tensor, counts: torch.Tensor) -> None:
    """Refuse a batch that has no variance; only ranks with less than two values need to look (their host waits)."""
    if input.numel() <= input.shape[1] and counts.sum() < 2:
        raise ValueError("expected more than one value per channel over all ranks when training")


class _SyncNormalizeByKernels(torch.autograd.Function):
    """The same by the kernels that torch.nn.SyncBatchNorm is made of; running statistics move within `forward`.

    What torch does there and not here: to look for ranks without images, for which the host waits. Theirs count as
    nothing, and the one value that must not be infinite in the kernel, their deviation, is 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        channels = input.shape[1]
        if input.numel():
            input = _dense(input)
            mean, invstd = torch.batch_norm_stats(input, eps)
        else:
            mean, invstd = running_mean.new_zeros(channels), running_mean.new_ones(channels)
        local = torch.cat([mean, invstd, mean.new_full((1,), input.numel() // channels)])
        means, invstds, counts = _gather(local).view(-1, local.numel()).split([channels, channels, 1], dim=1)
        _require_two_values(input, counts)
        positive = counts.reshape(-1).clamp(min=_NOTHING)  # 0 of 0 values would be NaN in the kernel
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            input, means, invstds, running_mean, running_var, momentum, eps, positive
        )
        ctx.save_for_backward(input, weight, mean, invstd, counts.reshape(-1).to(torch.int32))
        if not input.numel():
            return torch.empty_like(input)
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, invstd, counts = ctx.saved_tensors
        if not input.numel():
            nothing = torch.zeros_like(mean)
            _all_reduce(nothing.new_zeros(2 * len(mean)))
            return torch.zeros_like(input), nothing, nothing, None, None, None, None
        grad = _dense(grad)
        sum_grad, sum_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, input, mean, invstd, weight, True, True, True
        )
        sum_grad, sum_product = _all_reduce(torch.cat([sum_grad, sum_product])).chunk(2)
        grad_input = torch.batch_norm_backward_elemt(grad, input, mean, invstd, weight, sum_grad, sum_product, counts)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in a memory format that the kernels know."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


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
