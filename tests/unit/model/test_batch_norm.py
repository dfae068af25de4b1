"""Every batch norm mode equals torch's BatchNorm2d where it should, and is frozen where it should."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dist_deeplab.errors import UserError
from dist_deeplab.model import rank_exchange
from dist_deeplab.model.batch_norm import (
    EPS,
    MOMENTUM,
    FrozenBatchNorm,
    LocalBatchNorm,
    SyncBatchNorm,
    convolve_and_normalize,
    norm_factory,
)
from tests.unit.model import norm_kernels

TIMEOUT_S = 30.0  # a rank that fails breaks the barrier for the others instead of leaving them waiting


class ThreadWorld:
    """Ranks as threads of one process; has the part of `torch.distributed` that SyncBatchNorm uses.

    kernels: they go the way of CUDA tensors. gather_ranks: up to this many ranks statistics are gathered, else summed.
    """

    def __init__(self, size: int, *, kernels: bool = False, gather_ranks: int = 8) -> None:
        self.size = size
        self.kernels = kernels
        self.gather_ranks = gather_ranks
        self.barrier = threading.Barrier(size)
        self.local = threading.local()
        self.board: dict[int, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.size

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.board[self.local.rank] = tensor.clone()
        self.barrier.wait(TIMEOUT_S)
        gathered = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait(TIMEOUT_S)
        return gathered

    def all_reduce(self, tensor: torch.Tensor, group: object) -> None:
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: object) -> None:
        output.copy_(torch.cat(self._exchange(tensor)))

    def run(self, work: Callable[[int], object]) -> list[object]:
        """What `work(rank)` returns on every rank; autograd on the CPU runs backward in the calling thread."""

        def on_rank(rank: int) -> object:
            self.local.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank_exchange, "dist", self)
            patch.setattr(rank_exchange, "_all_gather", self.all_gather)
            patch.setattr(rank_exchange, "GATHER_RANKS", self.gather_ranks)
            if self.kernels:
                norm_kernels.use(patch)
            with ThreadPoolExecutor(self.size) as pool:
                futures = [pool.submit(on_rank, rank) for rank in range(self.size)]
            errors = [error for future in futures if (error := future.exception()) is not None]
            for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
                raise error  # the cause before the barriers that it broke
            return [future.result() for future in futures]


def _fill(layer: nn.BatchNorm2d, seed: int = 0) -> nn.BatchNorm2d:
    """Give a layer parameters and statistics that are not 0 and 1, the same for any layer of as many channels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def _buffers(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def _input(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 7


def _train_once(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients of sum(weight * output), and buffers after one training forward and backward."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (weight * y).sum().backward()
    assert x.grad is not None
    gradients = {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    return {"output": y.detach(), "input.grad": x.grad, **gradients, **_buffers(layer)}


@pytest.mark.quick("P3")
def test_sync_in_one_process_is_batch_norm_forward_backward_and_statistics() -> None:
    x, weight = _input(4, 3, 5, 6), _input(4, 3, 5, 6, seed=2)
    ours = _train_once(_fill(SyncBatchNorm(3).double()), x, weight)
    reference = _train_once(_fill(nn.BatchNorm2d(3, eps=EPS, momentum=MOMENTUM).double()), x, weight)
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.quick("P3")
@pytest.mark.parametrize("gather_ranks", [1, 8], ids=["summed", "gathered"])
@pytest.mark.parametrize("kernels", [False, True])
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) > 0))
def test_sync_over_any_split_of_a_batch_is_batch_norm_over_the_whole(
    kernels: bool, gather_ranks: int, sizes: list[int]
) -> None:
    x, weight = _input(sum(sizes), 3, 2, 4), _input(sum(sizes), 3, 2, 4, seed=2)
    reference = _train_once(_fill(nn.BatchNorm2d(3, eps=EPS, momentum=MOMENTUM).double()), x, weight)
    parts, weights = x.split(sizes), weight.split(sizes)
    layers = [_fill(SyncBatchNorm(3).double()) for _ in sizes]
    ranks = ThreadWorld(len(sizes), kernels=kernels, gather_ranks=gather_ranks).run(
        lambda rank: _train_once(layers[rank], parts[rank], weights[rank])
    )
    close = {"rtol": 1e-10, "atol": 1e-10}
    for name in ("output", "input.grad"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), reference[name], **close, msg=name)
    for name in ("weight.grad", "bias.grad"):
        torch.testing.assert_close(sum(rank[name] for rank in ranks), reference[name], **close, msg=name)
    for rank in ranks:
        torch.testing.assert_close(rank["running_mean"], reference["running_mean"], **close)
        torch.testing.assert_close(rank["running_var"], reference["running_var"], **close)
        assert int(rank["num_batches_tracked"]) == 1
        assert torch.equal(rank["running_var"], ranks[0]["running_var"])  # the same bits on all ranks


@pytest.mark.parametrize("gather_ranks", [1, 8], ids=["summed", "gathered"])
def test_sync_variance_does_not_cancel_where_the_mean_is_large(gather_ranks: int) -> None:
    x = _input(4, 2, 8, 8, dtype=torch.float32) + 10_000
    parts = x.split([1, 3])
    layers = [SyncBatchNorm(2, momentum=1.0) for _ in parts]
    ThreadWorld(2, gather_ranks=gather_ranks).run(lambda rank: layers[rank](parts[rank]))
    expected = x.double().transpose(0, 1).flatten(1).var(dim=1)
    torch.testing.assert_close(layers[0].running_var.double(), expected, rtol=1e-4, atol=0)


def test_summed_statistics_are_exact_where_the_running_mean_is_near_however_large() -> None:
    """float64, a mean a million deviations away: sums of plain squares would keep 4 digits."""
    x = _input(4, 2, 8, 8) + 3e6
    parts = x.split([1, 3])
    layers = [SyncBatchNorm(2, momentum=1.0).double() for _ in parts]
    for layer in layers:
        layer.running_mean.copy_(x.mean((0, 2, 3)) + 0.1)
    ThreadWorld(2, gather_ranks=1).run(lambda rank: layers[rank](parts[rank]))
    expected = (x - x.mean((0, 2, 3), keepdim=True)).transpose(0, 1).flatten(1).var(dim=1)
    torch.testing.assert_close(layers[0].running_var, expected, rtol=1e-9, atol=0)


class CountingWorld(ThreadWorld):
    """Counts the bytes that rank 0 receives."""

    received = 0

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = super()._exchange(tensor)
        self.received += sum(map(torch.Tensor.nbytes.__get__, gathered)) if self.local.rank == 0 else 0
        return gathered

    def all_reduce(self, tensor: torch.Tensor, group: object) -> None:
        super().all_reduce(tensor, group)
        if self.local.rank == 0:  # a ring passes on 2 (n - 1) / n of the tensor, not n of them
            self.received += 2 * tensor.nbytes - self.size * tensor.nbytes


@pytest.mark.quick("P10")
def test_what_travels_does_not_grow_with_the_ranks() -> None:
    x = _input(1, 8, 3, 3, dtype=torch.float32)
    received = {}
    for size in (2, 8, 9, 16):
        world = CountingWorld(size)
        layers = [SyncBatchNorm(8) for _ in range(size)]
        world.run(lambda rank, layers=layers: _train_once(layers[rank], x, x))
        received[size] = world.received
    assert received[9] == received[16] <= received[8]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sync_keeps_dtype_and_memory_format_and_has_float32_statistics(dtype: torch.dtype, kernels: bool) -> None:
    x = _input(2, 4, 6, 6).to(dtype).to(memory_format=torch.channels_last)
    layers = [SyncBatchNorm(4) for _ in range(2)]
    outputs = ThreadWorld(2, kernels=kernels).run(lambda rank: layers[rank](x))
    for y in outputs:
        assert isinstance(y, torch.Tensor)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert layers[0].running_mean.dtype == layers[0].running_var.dtype == torch.float32


@pytest.mark.parametrize("kernels", [False, True])
def test_sync_refuses_a_single_value_per_channel_over_all_ranks(kernels: bool) -> None:
    parts = _input(1, 3, 1, 1).split([1, 0])
    layers = [SyncBatchNorm(3).double() for _ in parts]
    with pytest.raises(ValueError, match="value"):
        ThreadWorld(2, kernels=kernels).run(lambda rank: layers[rank](parts[rank]))


@pytest.mark.quick("P3")
@pytest.mark.parametrize("mode", ["sync", "local", "frozen"])
def test_eval_uses_stored_statistics_and_leaves_every_buffer_bit_identical(mode: str) -> None:
    layer = _fill(norm_factory(mode)(3)).eval()
    before = _buffers(layer)
    x = _input(4, 3, 5, 5, dtype=torch.float32)
    y = ThreadWorld(2).run(lambda rank: layer(x))[0]
    view = (1, 3, 1, 1)
    expected = (x - before["running_mean"].view(view)) / (before["running_var"].view(view) + EPS).sqrt()
    torch.testing.assert_close(y, expected * layer.weight.view(view) + layer.bias.view(view))
    for name, value in _buffers(layer).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.quick("P3")
def test_frozen_stays_frozen_through_train() -> None:
    frozen = _fill(FrozenBatchNorm(3))
    net = nn.Sequential(nn.Conv2d(2, 3, 1), frozen)
    net.train()
    before = _buffers(frozen)
    x = _input(4, 2, 5, 5, dtype=torch.float32)
    y = net(x)
    y.square().sum().backward()
    assert torch.equal(y, net.eval()(x))
    assert [p.requires_grad for p in frozen.parameters()] == [False, False]
    assert [p.grad for p in frozen.parameters()] == [None, None]
    assert net[0].weight.grad.abs().sum() > 0
    for name, value in _buffers(frozen).items():
        assert torch.equal(value, before[name]), name


def test_frozen_within_the_convolution_is_frozen_after_it() -> None:
    frozen = _fill(FrozenBatchNorm(6)).double().train()
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, bias=False).double()
    x = _input(2, 4, 9, 8).requires_grad_()
    ours, theirs = convolve_and_normalize(conv, frozen, x), frozen(conv(x))
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(ours)
    gradients, expected = (torch.autograd.grad(y, [x, conv.weight], slope) for y in (ours, theirs))
    torch.testing.assert_close(gradients, expected)


def test_frozen_scale_and_shift_are_computed_once_and_again_after_any_change() -> None:
    frozen, other = _fill(FrozenBatchNorm(6)), _fill(FrozenBatchNorm(6), seed=3)
    first = frozen.scale_and_shift()
    assert frozen.scale_and_shift() is first
    changes: list[Callable[[], object]] = [
        lambda: frozen.running_var.mul_(2),
        lambda: frozen.load_state_dict(other.state_dict()),
        lambda: frozen.double(),
        lambda: frozen.load_state_dict({k: v.clone() for k, v in first_state.items()}, assign=True),
    ]
    first_state = _fill(FrozenBatchNorm(6), seed=4).state_dict()
    for change in changes:
        before = frozen.scale_and_shift()
        change()
        scale, shift = frozen.scale_and_shift()
        assert scale is not before[0]
        x = _input(2, 6, 3, 3, dtype=scale.dtype)
        torch.testing.assert_close(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), frozen(x))
    copied = copy.deepcopy(frozen)
    torch.testing.assert_close(copied.scale_and_shift(), frozen.scale_and_shift())


def test_frozen_keeps_nothing_that_a_trace_or_inference_made() -> None:
    frozen = _fill(FrozenBatchNorm(6))
    with torch.inference_mode():
        frozen.scale_and_shift()
    assert not frozen.scale_and_shift()[0].is_inference()
    frozen = _fill(FrozenBatchNorm(6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(frozen.scale_and_shift()[0], FakeTensor)
    assert type(frozen.scale_and_shift()[0]) is torch.Tensor


def test_frozen_stays_outside_the_convolution_in_float16_so_that_no_gradient_overflows() -> None:
    frozen = FrozenBatchNorm(3)
    frozen.running_var.fill_(1e6)
    conv = nn.Conv2d(2, 3, 1, bias=False)
    for dtype in (torch.float16, torch.bfloat16):
        conv.weight.grad = None
        with torch.autocast("cpu", dtype=dtype):
            y = convolve_and_normalize(conv, frozen, torch.full((1, 2, 30, 30), 50.0))
        y.backward(torch.full_like(y, 10.0))  # 900 x 50 x 10 is beyond float16, a thousandth of it is not
        torch.testing.assert_close(conv.weight.grad, torch.full_like(conv.weight, 450.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", ["sync", "local"])
@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_statistics_of_accumulated_micro_batches_move_as_far_as_those_of_one_large_batch(
    mode: str, accumulation: int
) -> None:
    x = _input(4, 3, 5, 5)
    large = _fill(nn.BatchNorm2d(3, eps=EPS, momentum=MOMENTUM).double())
    large(x)
    small = _fill(norm_factory(mode, accumulation=accumulation)(3).double())
    for _ in range(accumulation):
        small(x)
    torch.testing.assert_close(small.running_mean, large.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(small.running_var, large.running_var, rtol=1e-12, atol=0)


def test_local_batch_norm_is_torchs_and_lets_a_batch_of_no_images_pass() -> None:
    own, torchs = _fill(norm_factory("local")(3)), _fill(nn.BatchNorm2d(3))
    for images in (4, 0, 2):
        x = _input(images, 3, 5, 5, dtype=torch.float32)
        before = _buffers(own)
        y = own(x)
        assert y.shape == x.shape
        if images:
            assert torch.equal(y, torchs(x))
        else:
            assert all(torch.equal(value, before[name]) for name, value in _buffers(own).items())
    assert all(torch.equal(value, _buffers(torchs)[name]) for name, value in _buffers(own).items())


@pytest.mark.parametrize(
    ("mode", "kind"), [("sync", SyncBatchNorm), ("local", LocalBatchNorm), ("frozen", FrozenBatchNorm)]
)
def test_norm_factory_makes_the_layer_of_the_mode_with_the_prototxts_epsilon(mode: str, kind: type) -> None:
    layer = norm_factory(mode)(7)
    assert type(layer) is kind
    assert layer.num_features == 7
    assert layer.eps == 1e-5


def test_all_modes_share_names_so_that_weights_move_between_them() -> None:
    states = [norm_factory(mode)(4).state_dict() for mode in ("sync", "local", "frozen")]
    assert all(state.keys() == nn.BatchNorm2d(4).state_dict().keys() for state in states)


def test_torch_sync_bn_without_a_gpu_is_refused_and_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.sync_bn=own"):
        norm_factory("sync", sync_bn="torch")


def test_torch_sync_bn_with_a_gpu_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layer = norm_factory("sync", sync_bn="torch", accumulation=2)(3)
    assert type(layer) is nn.SyncBatchNorm
    assert layer.momentum == pytest.approx(1 - 0.9**0.5)
