"""What a GPU may do differently: lower precisions train, a step does not wait for the device, batch norm is the same.

python -m pytest tests/gpu

Each test runs on the CPU too, as far as its logic goes there, so that none is wrong on the day it meets a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from dist_deeplab.checkpointing.snapshot import Snapshot
from dist_deeplab.config import OptimConfig, load_config
from dist_deeplab.data.batch import Batch, blank_batch
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model import rank_exchange, sync_batch_norm
from dist_deeplab.model.batch_norm import EPS, MOMENTUM, SyncBatchNorm, norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training import memory
from dist_deeplab.training.cuda_graph import TOLERANCE, graph_network
from dist_deeplab.training.device_copy import DeviceCopier
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer, poly_lr, set_lr
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import StepResult, TrainStep
from tests.unit.model import norm_kernels

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and torch sees none")

ALONE = DistEnv(0, 0, 1, "single process")
IGNORE, NUM_CLASSES = 255, 21
CROP = 65 if torch.cuda.is_available() else 33  # some CPUs take seconds for a step in fp16


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        torch.set_num_threads(1)
    return str(request.param)


@contextlib.contextmanager
def host_never_waits(device: str) -> Iterator[None]:
    """On a GPU an operation that makes the host wait for the device is an error in here."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=device).item()  # the mode is on
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(batch: Batch) -> Batch:
    return batch.pin_memory() if torch.cuda.is_available() else batch


@pytest.fixture(autouse=True)
def torchs_own_flags() -> Iterator[None]:
    """`Precision` and these tests set global flags of torch; leave them as they were."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def _batches(num: int) -> list[Batch]:
    """Pinned micro-batches of random images, each label's upper part void, its lower part in bands."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(num):
        image = torch.randint(0, 256, (4, 3, CROP, CROP), dtype=torch.uint8, generator=generator)
        label = (torch.arange(CROP, dtype=torch.uint8) // 4 % NUM_CLASSES).view(1, CROP, 1).repeat(4, 1, CROP)
        label[:, : 8 * (number + 1)] = IGNORE
        content = torch.tensor([[CROP, CROP], [CROP - 8, CROP], [CROP, CROP // 2 + 8], [CROP // 2 + 1, CROP // 2 + 1]])
        batches.append(pinned(Batch(image, label, content, ["a", "b", "c", "d"])))
    return batches


def _step(dtype: str, *, norm: str = "sync", clip_norm: float = 0.0) -> TrainStep:
    """A step of a small network that starts from the same weights whatever the precision."""
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", NUM_CLASSES, norm=norm_factory(norm))
    model = prepare_model(MultiScale(net, (1.0, 0.75, 0.5) if torch.cuda.is_available() else ()), ALONE).train()
    optimizer = build_optimizer(net, OptimConfig(lr=1e-3))
    return TrainStep(model, optimizer, Precision(dtype, ALONE.device), CAFFE, CrossEntropy(IGNORE), clip_norm)


def _total(result: StepResult) -> float:
    return sum(float(loss) for loss in result.losses.values())


def _gradient(step: TrainStep) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None]).double().cpu()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_lower_precision_step_stays_finite_and_near_fp32(dtype: str) -> None:
    exact, lower = _step("fp32"), _step(dtype)
    batches = _batches(2)
    expected, result = exact(batches), lower(batches)
    for _ in range(20):  # fp16 starts with too large a scale and skips until it fits: nothing has moved by then
        if not result.skipped:
            break
        result = lower(batches)
    assert not result.skipped
    for name, loss in result.losses.items():
        assert float(loss) == pytest.approx(float(expected.losses[name]), rel=0.02)
    gradient, reference = _gradient(lower), _gradient(exact)
    assert torch.isfinite(gradient).all()
    cosine = float(gradient @ reference / gradient.norm() / reference.norm())
    assert cosine > 0.98
    assert float(gradient.norm()) == pytest.approx(float(reference.norm()), rel=0.1)
    assert all(torch.isfinite(tensor).all() for tensor in lower.model.state_dict().values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_on_one_batch_in_every_precision(dtype: str, device: str) -> None:
    step, batches = _step(dtype), _batches(1)
    num_steps = 60 if device == "cuda" else 2
    totals = [_total(step(batches)) for _ in range(num_steps)]
    assert totals[-1] < (0.8 if device == "cuda" else 1.0) * totals[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["local", "frozen"])
def test_a_micro_batch_of_no_images_changes_nothing(norm: str, dtype: str) -> None:
    alone, among, [batch] = _step(dtype, norm=norm), _step(dtype, norm=norm), _batches(1)
    expected, result = alone([batch]), among([batch, pinned(blank_batch(0, CROP))])
    assert _total(result) == pytest.approx(_total(expected), rel=1e-6)
    difference = _gradient(among) - _gradient(alone)
    assert float(difference.norm()) <= 1e-3 * float(_gradient(alone).norm())


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("norm", ["sync", "frozen"])
def test_a_step_never_waits_for_the_device(norm: str, clip_norm: float, device: str) -> None:
    step, batches = _step("bf16", norm=norm, clip_norm=clip_norm), _batches(2)
    step(batches)  # libraries load and choose algorithms in the first step
    num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # as the loop of train.py keeps it
    results = []
    with host_never_waits(device):
        for done in range(1, 3):
            set_lr(step.optimizer, poly_lr(done - num_skipped, OptimConfig(), max_steps=10))
            results.append(step(batches))
            num_skipped = num_skipped + results[-1].skipped.long()
    assert all(not result.skipped and _total(result) > 0 for result in results)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["local", "frozen"])
def test_a_step_of_cuda_graphs_is_that_of_the_plain_network(norm: str, dtype: str, device: str) -> None:
    """On the CPU tests/unit/training/test_cuda_graph.py shows the same with graphs that a CPU replays."""
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    plain, graphed, batches = _step(dtype, norm=norm), _step(dtype, norm=norm), _batches(2)
    images = torch.randn(4, 3, CROP, CROP, device=device).to(memory_format=torch.channels_last)
    graph_network(graphed.model, images, dtype)
    step = TrainStep(graphed.model, graphed.optimizer, graphed.precision, CAFFE, CrossEntropy(IGNORE))
    for _ in range(3):
        assert _total(step(batches)) == pytest.approx(_total(plain(batches)), rel=0.02)
        error = (_gradient(step) - _gradient(plain)).norm() / _gradient(plain).norm()
        assert float(error) <= TOLERANCE[dtype]


class EchoWorld:
    """Two ranks with the same batch, as one sees it: the part of `torch.distributed` that SyncBatchNorm uses."""

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, tensor: torch.Tensor, group: object) -> None:
        tensor.mul_(2)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor, group: object) -> None:
        output.copy_(torch.cat([tensor, tensor]))


@pytest.fixture
def two_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = EchoWorld()
    monkeypatch.setattr(rank_exchange, "dist", world)
    monkeypatch.setattr(rank_exchange, "_all_gather", world.all_gather)


def _filled(make: Callable[[int], nn.BatchNorm2d], device: str) -> nn.BatchNorm2d:
    layer = make(8).to(device)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, 8))
        layer.bias.copy_(torch.linspace(-1, 1, 8))
    return layer


@pytest.fixture(params=[True, False], ids=["kernels", "portable"])
def way(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations on a GPU: torch's kernels, and what a CPU and a compiled graph use.

    On the CPU stand-ins with the kernels' signatures take their place.
    """
    if request.param and device == "cpu":
        norm_kernels.use(monkeypatch)
    monkeypatch.setattr(sync_batch_norm, "has_kernels", lambda input: request.param)


@pytest.fixture(params=[1, 8], ids=["summed", "gathered"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_exchange, "GATHER_RANKS", request.param)


@pytest.mark.usefixtures("two_equal_ranks", "way", "exchange")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sync_batch_norm_equals_batch_norm_over_both_ranks(
    dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    half = (2 * torch.randn(3, 8, 9, 7, generator=generator) + 5).to(dtype)
    weight = torch.randn(3, 8, 9, 7, generator=generator).to(dtype)

    layer = _filled(SyncBatchNorm, device)
    x = half.clone().to(device, memory_format=memory_format).requires_grad_()
    y = layer(x)
    y.backward(weight.to(device, memory_format=memory_format))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)

    reference = _filled(lambda n: nn.BatchNorm2d(n, eps=EPS, momentum=MOMENTUM), "cpu").double()
    both = torch.cat([half, half]).double().requires_grad_()
    expected = reference(both)
    expected.backward(torch.cat([weight, weight]).double())

    def close(value: torch.Tensor, wanted: torch.Tensor, bound: float = tolerance) -> None:
        assert float((value.double().cpu() - wanted).norm() / wanted.norm()) <= bound

    close(y.detach(), expected.detach()[:3])
    close(x.grad, both.grad[:3])
    close(2 * layer.weight.grad, reference.weight.grad)
    close(2 * layer.bias.grad, reference.bias.grad)
    close(layer.running_mean, reference.running_mean, 1e-5)  # statistics are float32 whatever the input
    close(layer.running_var, reference.running_var, 1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("own_images", [0, 3])
def test_a_rank_without_images_counts_as_nothing(own_images: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one of them with three images, the other with none: as torch's batch norm of the three."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, 8, 9, 7, generator=generator) + 5
    layer = _filled(SyncBatchNorm, device)
    reference = _filled(lambda n: nn.BatchNorm2d(n, eps=EPS, momentum=MOMENTUM), "cpu")
    expected = reference(x)

    def exchange(own: torch.Tensor, group: object) -> torch.Tensor:
        """What the rank of the other number of images sends, by a layer that listens to what it sends."""
        sent = []
        other = _filled(SyncBatchNorm, device)
        with monkeypatch.context() as patch:
            patch.setattr(rank_exchange, "gather", lambda tensor, group: sent.append(tensor) or torch.cat([own, own]))
            other((x[:0] if own_images else x).to(device))
        return torch.cat([own, sent[0]])

    monkeypatch.setattr(rank_exchange, "is_alone", lambda: False)
    monkeypatch.setattr(rank_exchange, "gathers", lambda: True)
    monkeypatch.setattr(rank_exchange, "gather", exchange)
    y = layer(x[:own_images].to(device))
    torch.testing.assert_close(y.cpu(), expected[:own_images], rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name).cpu(), getattr(reference, name), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("two_equal_ranks", "way", "exchange")
def test_sync_batch_norm_never_waits_for_the_device(device: str) -> None:
    layer = SyncBatchNorm(8).to(device)
    x = torch.randn(2, 8, 9, 9, device=device, requires_grad=True)
    layer(x).sum().backward()
    with host_never_waits(device):
        layer(x).sum().backward()


def test_uploads_read_what_was_given_though_they_run_beside_the_compute(device: str) -> None:
    upload = DeviceCopier(torch.device(device))
    sources = [torch.full((512, 512), float(number)) for number in range(50)]
    sources = [source.pin_memory() if device == "cuda" else source for source in sources]
    busy = torch.randn(2048 if device == "cuda" else 64, 2048 if device == "cuda" else 64, device=device)
    sums = []
    for tensor in sources:
        busy = (busy @ busy).clamp(-1, 1)
        [copy] = upload(tensor)
        sums.append(copy.sum() + 0 * busy.sum())
        del copy
    assert [float(total) for total in sums] == [number * 512.0 * 512 for number in range(50)]


def test_what_is_not_in_pinned_memory_arrives_too_though_it_is_freed_at_once(device: str) -> None:
    upload = DeviceCopier(torch.device(device))
    copies = [upload(torch.full((300, 41, 41), number))[0] for number in range(50)]
    assert [int(copy.float().mean()) for copy in copies] == list(range(50))


def test_a_snapshot_holds_what_was_there_when_it_was_taken(device: str) -> None:
    """Its buffers are pinned on a GPU and used again; training continues while they are written."""
    step, batches = _step("fp32"), _batches(1)
    snapshot = Snapshot()
    for _ in range(2):
        step(batches)
        content = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict()}
        expected = {name: tensor.detach().cpu().clone() for name, tensor in content["model"].items()}
        copy = snapshot.take(content)
        step(batches)
        assert all(torch.equal(copy["model"][name], tensor) for name, tensor in expected.items())
        assert all(not tensor.is_cuda for tensor in copy["model"].values())
    with torch.no_grad():
        next(step.model.parameters()).fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        snapshot.take({"model": step.model.state_dict()})


def test_the_micro_batch_search_takes_the_largest_size_that_fits(
    device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """On a GPU by trying, with memory that runs out on the way; on the CPU the same search with an error like its."""
    sizes = [64, 8, 2, 1]
    if device == "cuda":
        config = load_config(None, ["model.backbone=resnet_tiny", "data.crop_size=129"])
        torch.cuda.set_per_process_memory_fraction(0.02)
        request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.0))
        fits = memory._gpu_trial(config, SCRATCH, torch.device(device))
        largest = memory.largest_fitting([2**16, *sizes], fits)
        assert largest in sizes
        assert torch.cuda.memory_allocated() < 2**20, "the search left something behind"
        assert memory.largest_fitting([largest], fits) == largest, "and the size still fits"
        return

    def fits_two(size: int) -> bool:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    assert memory.largest_fitting(sizes, fits_two) == 2
