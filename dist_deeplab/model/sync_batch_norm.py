"""Batch norm over the batches of all ranks, on CUDA and CPU.

On n ranks `SyncBatchNorm` equals one `nn.BatchNorm2d` on the concatenated batch: output, gradients and running
statistics, with per-rank batches of unequal size too. torch.nn.SyncBatchNorm does the same on CUDA but refuses CPU
tensors, makes the host wait in each layer, and cannot be compiled.

Two implementations give the same result. `_SyncNormalize` is made of operators that every device has and that can be
compiled. `_SyncNormalizeByKernels` has a third of the launches: torch's own CUDA kernels for this very purpose.

What travels in forward, per layer of C channels:
    up to GATHER_RANKS ranks   each rank's mean, variance and count, gathered: 4 (2 C + 1) bytes from each rank
    more ranks                 sums, all-reduced in float64: 8 (2 C + 1) bytes whatever their number
Gathering takes fewer launches and, with gloo, half the messages; beyond a node its traffic would grow with the ranks.
The sums are of deviations from the running mean (the same bits on all ranks), so that the variance, mean square minus
squared mean, hardly cancels; where that is far off, as at the start, float64 has 29 more bits than the inputs' float32.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dist_deeplab.model import rank_exchange

_NOTHING = 1e-30  # the number of values of a rank without images


def has_kernels(input: torch.Tensor) -> bool:
    """Whether torch's kernels for synchronised batch norm can be used on `input` here."""
    return input.is_cuda and not torch.compiler.is_compiling()


class SyncBatchNorm(nn.BatchNorm2d):
    """Normalises by statistics over the batches of all ranks while training, by stored ones in eval mode.

    One collective in forward and one in backward; every rank must call it equally often. Memory format and dtype of
    the input are kept; statistics are at least float32.

    group: process group of these collectives, which must hold all ranks; None: the default one (see `use_group`).
    """

    group: "dist.ProcessGroup | None" = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [B, C, H, W] of the input's dtype.

        Raises:
            ValueError: in training, fewer than two values per channel over all ranks.
        """
        if not self.training or rank_exchange.is_alone():
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        running = self.running_mean, self.running_var
        if has_kernels(input):
            constants = self.momentum, self.eps, self.group
            return _SyncNormalizeByKernels.apply(input, self.weight, self.bias, *running, *constants)
        output, mean, var, count = _SyncNormalize.apply(
            input, self.weight, self.bias, self.running_mean, self.eps, self.group
        )
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


def use_group(net: nn.Module, group: "dist.ProcessGroup | None") -> None:
    """Let the synchronised layers of `net` communicate in a process group of their own.

    NCCL runs the collectives of one group in order: in the default group these would wait in backward for the large
    gradient buckets that DDP has started before them (pytorch#137390).
    """
    for module in net.modules():
        if isinstance(module, SyncBatchNorm):
            module.group = group


class _SyncNormalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with mean and var over all ranks.

    The heavy passes are torch's own fused kernels: `batch_norm_update_stats` for the moments, evaluation-mode batch
    norm for the normalisation, and its backward for the two reductions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        eps: float,
        group: "dist.ProcessGroup | None",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, var, count = _global_moments(input, running_mean, group)
        output = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps) if input.numel() else input.clone()
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
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
        sums = rank_exchange.total(torch.stack([grad_weight, grad_bias]), ctx.group)
        slope, offset = sums * (weight * torch.rsqrt(var + ctx.eps) / count)
        if input.numel():
            grad_input -= F.batch_norm(input, mean, var, slope, offset, False, 0.0, ctx.eps)
        return grad_input, grad_weight, grad_bias, None, None, None


def _global_moments(
    input: torch.Tensor, running_mean: torch.Tensor, group: "dist.ProcessGroup | None"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] and the count [] over all ranks, float32 (float64 for such input)."""
    channels = input.shape[1]
    wide = input if input.dtype == torch.float64 else input.float()
    if input.numel():
        mean, var = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
    else:
        mean, var = wide.new_zeros(channels), wide.new_zeros(channels)
    local = torch.cat([mean, var, mean.new_full((1,), input.numel() // channels)])
    if rank_exchange.gathers():
        mean, var, count = _merge(rank_exchange.gather(local, group).view(-1, local.numel()), channels)
    else:
        mean, var, count = _merge_by_sums(local, running_mean, group)
    _require_two_values(input, count)
    return mean.to(wide.dtype), var.to(wide.dtype), count.to(wide.dtype)


def _merge(rows: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and count, float64, of rows [ranks, 2 C + 1] of the same.

    In rank order, so all ranks hold the same bits; merging moments instead of sums of squares avoids cancellation
    (Chan, Golub and LeVeque 1983).
    """
    means, variances, counts = rows.double().split([channels, channels, 1], dim=1)
    count = counts.sum()
    shares = counts / count
    mean = (means * shares).sum(0)
    distance = means - mean
    return mean, (torch.addcmul(variances, distance, distance) * shares).sum(0), count


def _merge_by_sums(
    local: torch.Tensor, pivot: torch.Tensor, group: "dist.ProcessGroup | None"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and count over all ranks, float64, of each rank's own in `local` [2 C + 1]; `pivot` [C]."""
    mean, var, count = local.double().split([len(pivot), len(pivot), 1])
    deviation = mean - pivot
    moments = torch.cat([deviation, torch.addcmul(var, deviation, deviation), torch.ones_like(count)])
    sums = rank_exchange.all_reduce(moments * count, group)
    deviation, square = (sums[:-1] / sums[-1]).chunk(2)
    return pivot + deviation, torch.addcmul(square, deviation, deviation, value=-1).clamp(min=0), sums[-1]


def _merge_in_place(
    mean: torch.Tensor,
    invstd: torch.Tensor,
    num_values: int,
    *,
    pivot: torch.Tensor,
    eps: float,
    group: "dist.ProcessGroup | None",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_merge_by_sums` in half as many launches, of which a GPU has thousands per step: as if all ranks were one.

    Args:
        mean: this rank's [C].
        invstd: its 1 / sqrt(var + eps) [C].
        num_values: its values of each channel.
        pivot: near the mean [C], the same on all ranks.
        eps: the layer's.
        group: of the all-reduce.

    Returns:
        Mean and inverse standard deviation [1, C] and number of values [1] of all ranks, in the type of `mean`.
    """
    sums = mean.new_empty(2 * len(mean) + 1, dtype=torch.float64)
    deviation, square, count = sums.split([len(mean), len(mean), 1])
    torch.sub(mean, pivot, out=deviation)
    torch.pow(invstd, -2, out=square).addcmul_(deviation, deviation)  # var + eps + deviation^2
    sums[:-1].mul_(num_values)
    count.fill_(num_values)
    rank_exchange.all_reduce(sums, group)
    sums[:-1].div_(count)
    square.addcmul_(deviation, deviation, value=-1).clamp_(min=eps)
    merged = torch.add(pivot, deviation, out=torch.empty_like(mean)), torch.rsqrt(square, out=torch.empty_like(invstd))
    return merged[0][None], merged[1][None], count.to(mean.dtype)


def _require_two_values(input: torch.Tensor, count: torch.Tensor) -> None:
    """Refuse a batch that has no variance; only ranks with less than two values need to look (their host waits).

    count: number of values per channel, in all or of each rank.
    """
    if input.numel() <= input.shape[1] and count.sum() < 2:
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
        group: "dist.ProcessGroup | None",
    ) -> torch.Tensor:
        channels = input.shape[1]
        if input.numel():
            input = _dense(input)
            mean, invstd = torch.batch_norm_stats(input, eps)
        else:
            mean, invstd = running_mean.new_zeros(channels), running_mean.new_ones(channels)
        num_values = input.numel() // channels
        if rank_exchange.gathers():
            local = torch.cat([mean, invstd, mean.new_full((1,), num_values or _NOTHING)])  # 0 of 0: NaN in the kernel
            means, invstds, counts = (
                rank_exchange.gather(local, group).view(-1, local.numel()).split([channels, channels, 1], dim=1)
            )
            counts = counts.reshape(-1)
        else:
            means, invstds, counts = _merge_in_place(mean, invstd, num_values, pivot=running_mean, eps=eps, group=group)
        _require_two_values(input, counts)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            input, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(input, weight, mean, invstd, counts.to(torch.int32))
        ctx.group = group
        if not input.numel():
            return torch.empty_like(input)
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, invstd, counts = ctx.saved_tensors
        if not input.numel():
            nothing = torch.zeros_like(mean)
            rank_exchange.total(nothing.new_zeros(2 * len(mean)), ctx.group)
            return torch.zeros_like(input), nothing, nothing, None, None, None, None, None
        grad = _dense(grad)
        sum_grad, sum_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, input, mean, invstd, weight, True, True, True
        )
        sum_grad, sum_product = rank_exchange.total(torch.cat([sum_grad, sum_product]), ctx.group).chunk(2)
        grad_input = torch.batch_norm_backward_elemt(grad, input, mean, invstd, weight, sum_grad, sum_product, counts)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` in a memory format that the kernels know."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
