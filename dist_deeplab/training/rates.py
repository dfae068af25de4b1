"""How fast a rank's parts are, measured for seconds, and what they say about a configured run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_deeplab.config import RunConfig
from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.logs import format_duration
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.flops import training_flops
from dist_deeplab.training.data_builders import build_augmentation
from dist_deeplab.training.precision import Precision

_REPEATS = 5
_COPY_BYTES = {"cuda": 2**28, "cpu": 2**25}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
_CONV_IMAGES = {"cuda": 8, "cpu": 1}
_LOADER_S = 8.0


@dataclass(frozen=True)
class Rates:
    """One rank's rates; the last two are None where nothing was measured. FLOP counts a multiply-add as two."""

    matmul_flops_per_s: float
    conv_flops_per_s: float
    host_to_device_bytes_per_s: float
    loader_images_per_s: float | None = None
    all_reduce_bytes_per_s: float | None = None

    def describe(self) -> dict[str, str]:
        """One line for each."""
        lines = {
            "matrix product": f"{self.matmul_flops_per_s / 1e12:.3g} TFLOP/s",
            "convolution": f"{self.conv_flops_per_s / 1e12:.3g} TFLOP/s (3x3, dilation 2, forward and backward)",
            "host to device": f"{self.host_to_device_bytes_per_s / 1e9:.3g} GB/s",
        }
        if self.loader_images_per_s:
            lines["loader"] = f"{self.loader_images_per_s:.3g} images/s per rank"
        return lines


@dataclass(frozen=True)
class Forecast:
    """Seconds per step that each part would take alone, which of them limits the run, and what to set."""

    compute_s: float
    loader_s: float
    all_reduce_s: float
    host_to_device_s: float
    limit: str
    run_s: float
    advice: str

    def __str__(self) -> str:
        names = {"compute": self.compute_s, "loader": self.loader_s, "all-reduce": self.all_reduce_s}
        each = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in names.items())
        return f"per step: {each}; limited by {self.limit}: about {format_duration(self.run_s)} in all; {self.advice}"


def measure_arithmetic(precision: str, device: torch.device) -> tuple[float, float]:
    """FLOP/s of a matrix product and of a dilated convolution's forward and backward, in an arithmetic."""
    arithmetic = Precision(precision, device)
    size, images = _MATMUL_SIZE[device.type], _CONV_IMAGES[device.type]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    conv = torch.nn.Conv2d(256, 256, 3, padding=2, dilation=2, bias=False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(images, 256, 41, 41, device=device).to(memory_format=torch.channels_last).requires_grad_()

    def multiply() -> None:
        with arithmetic.autocast():
            _ = a @ b

    def convolve() -> None:
        with arithmetic.autocast():
            y = conv(x)
        y.backward(y.detach())

    conv_flops = 3 * 2 * images * 41 * 41 * 256 * 256 * 9
    return 2 * size**3 / _median_s(multiply, device), conv_flops / _median_s(convolve, device)


def measure_copy(device: torch.device) -> float:
    """Bytes per second from host memory (pinned, for a GPU) to the device."""
    num_bytes = _COPY_BYTES[device.type]
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / _median_s(lambda: target.copy_(host, non_blocking=True), device)


def measure_loader(config: RunConfig, env: DistEnv, split: BatchSplit, train_set: Manifest) -> float:
    """Images per second of this rank's loader as training runs it, after its workers have started."""
    images, started = 0, 0.0
    begun = time.perf_counter()
    data = config.data
    dataset = TrainDataset(
        train_set,
        seed=config.seed,
        num_classes=data.num_classes,
        augmentation=build_augmentation(config),
        max_bad_samples=data.max_bad_samples,
    )
    sampler = StepSampler(0, config.max_steps, split=split, rank=env.rank)
    pin_memory = env.device.type == "cuda"
    for _, micro_batches in TrainLoader(dataset, sampler, num_workers=data.num_workers, pin_memory=pin_memory):
        now = time.perf_counter()
        if started:
            images += sum(len(batch.keys) for batch in micro_batches)
        else:
            started = now
        if now - begun > _LOADER_S and images:
            break
    return images / max(1e-9, time.perf_counter() - started)


def forecast(config: RunConfig, env: DistEnv, split: BatchSplit, rates: Rates) -> Forecast:
    """What the rates of the slowest rank say about the configured run; parts that overlap do not add up."""
    crop, scales = config.data.crop_size, config.multi_scale.scales
    with torch.device("meta"):
        net = DeepLabV2(config.model.backbone, config.data.num_classes, norm=norm_factory("frozen"))
    flops = training_flops(MultiScale(net, scales), (crop, crop))
    images = split.global_size / env.world_size
    bytes_of_gradients = 4 * sum(parameter.numel() for parameter in net.parameters())
    compute_s = images * flops / rates.conv_flops_per_s
    loader_s = images / rates.loader_images_per_s if rates.loader_images_per_s else 0.0
    all_reduce_s = bytes_of_gradients / rates.all_reduce_bytes_per_s if rates.all_reduce_bytes_per_s else 0.0
    copy_s = images * 4 * crop * crop / rates.host_to_device_bytes_per_s
    parts = {"compute": compute_s, "loader": loader_s, "all-reduce": all_reduce_s, "host-to-device copies": copy_s}
    limit = max(parts, key=lambda name: parts[name])
    half = config.precision.dtype not in ("fp32", "tf32")
    advice = {
        "compute": "more GPUs" if half else "precision.dtype=bf16 on hardware made for it, or more GPUs",
        "loader": f"more than data.num_workers={config.data.num_workers}, or shards on a faster disk (data.cache_dir)",
        "all-reduce": "speed.compress_gradients=true, a larger batch.global_size, or fewer ranks",
        "host-to-device copies": "pinned memory and a wider link to the GPU",
    }[limit]
    return Forecast(compute_s, loader_s, all_reduce_s, copy_s, limit, config.max_steps * parts[limit], advice)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one loads libraries
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
