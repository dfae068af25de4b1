"""What torch's CUDA kernels for synchronised batch norm compute, in plain operators: they have no CPU version.

After aten/src/ATen/native/cuda/Normalization.cuh: what goes in, what comes out, and where they would make NaN.
"""

import pytest
import torch

from dist_deeplab.model import sync_batch_norm

Pair = tuple[torch.Tensor, torch.Tensor]


def use(patch: pytest.MonkeyPatch) -> None:
    """Let SyncBatchNorm take the kernels' way, with these in their place."""
    patch.setattr(sync_batch_norm, "has_kernels", lambda input: True)
    for function in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
        patch.setattr(torch, f"batch_norm_{function.__name__}", function)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def spread(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


def stats(input: torch.Tensor, eps: float) -> Pair:
    assert input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)
    var, mean = torch.var_mean(wide(input), dim=(0, 2, 3), correction=0)
    return mean, 1 / (var + eps).sqrt()


def gather_stats_with_counts(
    input: torch.Tensor,
    means: torch.Tensor,
    invstds: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> Pair:
    assert counts.dtype == running_mean.dtype
    assert counts.dim() == 1
    mean, squares, n = torch.zeros_like(means[0]), torch.zeros_like(means[0]), 0
    for one, invstd, count in zip(means, invstds, counts, strict=True):
        share = 1 / (n + count)
        squares = squares + (1 / invstd**2 - eps) * count + (mean - one) ** 2 * n * count * share
        mean = n * share * mean + count * share * one
        n = int(n + count)  # the kernel counts in whole numbers
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (squares / (n - 1) - running_var)
    return mean, 1 / (squares / n + eps).sqrt()


def elemt(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, eps: float
) -> torch.Tensor:
    return ((wide(input) - spread(mean)) * spread(invstd * weight) + spread(bias)).to(input.dtype)


def backward_reduce(
    grad: torch.Tensor,
    input: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    *wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert wanted == (True, True, True)
    sum_grad = wide(grad).sum((0, 2, 3))
    sum_product = (wide(grad) * (wide(input) - spread(mean))).sum((0, 2, 3))
    return sum_grad, sum_product, (sum_product * invstd).to(weight.dtype), sum_grad.to(weight.dtype)


def backward_elemt(
    grad: torch.Tensor,
    input: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor,
    sum_grad: torch.Tensor,
    sum_product: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    assert counts.dtype == torch.int32
    n = counts.sum()
    slope = spread(invstd**2 * sum_product / n)
    centred = wide(grad) - spread(sum_grad / n) - (wide(input) - spread(mean)) * slope
    return (centred * spread(invstd * weight)).to(grad.dtype)
