"""On each rank: compare SyncBatchNorm on this rank's part with BatchNorm2d on the whole batch, in float64.

Arguments: one or more SIZE,SIZE..., the number of images of each rank. Exits non-zero with the difference where one is
above 1e-12.
"""

from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from dist_deeplab.distributed.parallel import separate_group
from dist_deeplab.distributed.process_group import DistEnv, all_reduce_sum
from dist_deeplab.model import rank_exchange, sync_batch_norm
from dist_deeplab.model.batch_norm import SyncBatchNorm

CHANNELS = 5


def require_close(env: DistEnv, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.numel():
        difference = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert difference < 1e-12, f"rank {env.rank}: {name} differs by {difference:.1e}"


def check(env: DistEnv, group: dist.ProcessGroup | None, sizes: list[int], memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    whole = torch.randn(sum(sizes), CHANNELS, 4, 7, dtype=torch.float64) * 3 + 10
    grad = torch.randn_like(whole)
    expected_norm = nn.BatchNorm2d(CHANNELS).double()
    nn.init.uniform_(expected_norm.weight, -1, 1)
    nn.init.uniform_(expected_norm.bias)
    norm = SyncBatchNorm(CHANNELS).double()
    norm.load_state_dict(expected_norm.state_dict())
    sync_batch_norm.use_group(norm, group)
    start = sum(sizes[: env.rank])
    mine = slice(start, start + sizes[env.rank])

    for _ in range(3):  # the running statistics move more than once
        whole.requires_grad_(True).grad = None
        expected_norm.zero_grad()
        norm.zero_grad()
        expected = expected_norm(whole)
        expected.backward(grad)
        part = whole.detach()[mine].contiguous(memory_format=memory_format).requires_grad_(True)
        output = norm(part)
        output.backward(grad[mine])
        require_close(env, "output", output, expected[mine])
        require_close(env, "input gradient", part.grad, whole.grad[mine])
        for name in ("weight", "bias"):
            total = all_reduce_sum(getattr(norm, name).grad.clone())
            require_close(env, f"{name} gradient", total, getattr(expected_norm, name).grad)
        for name, buffer in norm.named_buffers():
            require_close(env, name, buffer.double(), dict(expected_norm.named_buffers())[name].double())
        assert output.is_contiguous(memory_format=memory_format) or not part.numel()

    norm.eval()
    before = [buffer.clone() for buffer in norm.buffers()]
    norm(whole.detach()[mine])
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers(), strict=True)), "eval moved the statistics"


def main(env: DistEnv, *shares: str) -> None:
    group = separate_group(env.device)
    for sizes in shares:
        for layout in (torch.contiguous_format, torch.channels_last):
            for gather_ranks in (1, 8):  # sums, and gathered moments
                with mock.patch.object(rank_exchange, "GATHER_RANKS", gather_ranks):
                    check(env, group, [int(size) for size in sizes.split(",")], layout)
