"""One optimizer step, ours against the two loops that others write, on the same images and network.

eager: float32, contiguous NCHW images normalised on the CPU, labels resized on the CPU, BatchNorm2d, plain SGD, the
loss read back every step. amp: autocast (bf16) and channels-last memory, logits upsampled to the image and scored
there, the loss read back every step (the form of torchvision's segmentation reference). ours_*: this project's
`TrainStep`, as training runs it. Data loading is not in it (see `loader`); uploading is.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.harness import Report, Row, Timing, best_device, interleave, ratio_column, synchronizer
from dist_deeplab.config import OptimConfig
from dist_deeplab.data.loader import Batch
from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.flops import training_flops
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.runtime.distributed import DistEnv
from dist_deeplab.runtime.parallel import prepare_model
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep

SUMMARY = "an optimizer step: images/s, parts, memory, share of the matmul peak"
IGNORE_LABEL, NUM_CLASSES = 255, 21
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
OPTIONS = ("nchw", "compile", "recompute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet101" if on_gpu else "resnet_tiny", help="default: %(default)s")
    parser.add_argument("--crop", type=int, default=321 if on_gpu else 65, help="pixels, 8k+1; default: %(default)s")
    parser.add_argument(
        "--images", type=int, default=10 if on_gpu else 4, help="images of a step; default: %(default)s"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step; default: %(default)s")
    parser.add_argument(
        "--ours",
        nargs="+",
        type=variant,
        default=[variant("fp32"), variant("bf16")],
        metavar="DTYPE[+OPTION...]",
        help=f"ours in {', '.join(PRECISIONS)}, with any of {', '.join(OPTIONS)}; default: fp32 bf16",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each; default: %(default)s")


@dataclass(frozen=True)
class Variant:
    """A way to run our step: a `precision.dtype` and options of the section `speed`, `nchw` for channels_last=false."""

    dtype: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the table calls it."""
        return "+".join((f"ours_{self.dtype}", *self.options))


def variant(text: str) -> Variant:
    """Read `bf16+compile+recompute`."""
    dtype, *options = text.split("+")
    if dtype not in PRECISIONS or not set(options) <= set(OPTIONS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(PRECISIONS)} with any of {', '.join(OPTIONS)} added, e.g. bf16+compile"
        )
    return Variant(dtype, tuple(options))


def run(arguments: argparse.Namespace) -> Report:
    if arguments.images % arguments.accumulation:
        raise UserError(f"--images {arguments.images} is no multiple of --accumulation {arguments.accumulation}")
    device = best_device()
    torch.manual_seed(0)
    net = DeepLabV2(arguments.backbone, NUM_CLASSES, norm=norm_factory("local"))
    batches = draw_batches(arguments.images // arguments.accumulation, arguments.accumulation, arguments.crop)
    competitors: dict[str, Callable[[], object]] = {
        "eager": Fp32Eager(copy.deepcopy(net), batches, device),
        "amp": AmpChannelsLast(copy.deepcopy(net), batches, device),
        **{variant.name: Ours(copy.deepcopy(net), batches, variant) for variant in arguments.ours},
    }
    synchronize = synchronizer(device)
    first = {
        name: interleave({name: run_once}, rounds=1, warmup=0, synchronize=synchronize)[name]
        for name, run_once in competitors.items()
    }
    timings = interleave(competitors, rounds=arguments.rounds, warmup=2, synchronize=synchronize)
    flops = training_flops(MultiScale(net), (arguments.crop, arguments.crop))
    peak = matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    rows = [
        {
            **row(name, timing, competitors[name], arguments, flops=flops, peak=peak, device=device),
            "first_s": first[name].median,
        }
        for name, timing in timings.items()
    ]
    ratio_column(rows, of="images_per_s", to="eager", name="x_eager")
    ratio_column(rows, of="images_per_s", to="amp", name="x_amp")
    shape = f"{arguments.images} x {arguments.crop} x {arguments.crop} in {arguments.accumulation} micro-batches"
    notes = [
        f"{flops / 1e9:.3g} GFLOP an image, forward and backward (two a multiply-add, convolutions only)",
        f"matmul peak measured: {peak / 1e12:.3g} TFLOP/s in {'bf16' if device.type == 'cuda' else 'fp32'}",
        "first_s: the first step, with what is loaded, compiled and chosen in it",
        "parts are measured one step at a time with a wait after each, so they add up to more than the step",
    ]
    return Report(f"optimizer step of {arguments.backbone}, {shape}", rows, notes)


def row(
    name: str,
    timing: Timing,
    competitor: Callable[[], object],
    arguments: argparse.Namespace,
    *,
    flops: int,
    peak: float,
    device: torch.device,
) -> Row:
    """Return the table's row of a competitor."""
    rate = arguments.images / timing.median
    has_parts = isinstance(competitor, Ours) and not competitor.compiled  # a compiled graph is one piece
    parts = measure_parts(competitor, synchronizer(device)) if has_parts else {}
    return {
        "what": name,
        "images_per_s": rate,
        "step_ms": 1e3 * timing.median,
        "spread": timing.spread,
        **{f"{part}_ms": parts.get(part) for part in ("forward", "backward", "update", "rest")},
        "work_gib": working_memory_gib(competitor, device),
        "of_peak": rate * flops / peak,
    }


def draw_batches(micro_size: int, accumulation: int, crop: int) -> list[Batch]:
    """Return micro-batches of random pixels, as the loader gives them; a tenth of the labels is void."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(accumulation):
        image = torch.randint(0, 256, (micro_size, 3, crop, crop), dtype=torch.uint8, generator=generator)
        label = torch.randint(0, NUM_CLASSES, (micro_size, crop, crop), dtype=torch.uint8, generator=generator)
        label[torch.rand(label.shape, generator=generator) < 0.1] = IGNORE_LABEL
        content = torch.full((micro_size, 2), crop)
        batch = Batch(image.to(memory_format=torch.channels_last), label, content, [str(i) for i in range(micro_size)])
        batches.append(batch.pin_memory() if torch.cuda.is_available() else batch)
    return batches


class Fp32Eager:
    """The loop of most DeepLab repositories."""

    def __init__(self, net: DeepLabV2, batches: list[Batch], device: torch.device) -> None:
        self.net, self.device = net.to(device).train(), device
        self.optimizer = build_optimizer(net, OptimConfig())
        mean = torch.tensor(CAFFE.mean).view(1, 3, 1, 1)
        self.batches = [((b.image.flip(1).float() - mean).contiguous(), b.label) for b in batches]

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for image, label in self.batches:
            logits = self.net(image.to(self.device))
            resized = [
                Image.fromarray(one.numpy()).resize(logits.shape[:1:-1], Image.Resampling.NEAREST) for one in label
            ]
            target = torch.from_numpy(np.stack([np.asarray(one) for one in resized])).long().to(self.device)
            loss = F.cross_entropy(logits, target, ignore_index=IGNORE_LABEL) / len(self.batches)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


class AmpChannelsLast:
    """The mixed-precision loop of torchvision's segmentation reference, in bf16 and channels-last memory."""

    def __init__(self, net: DeepLabV2, batches: list[Batch], device: torch.device) -> None:
        self.net = net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.device = device
        self.optimizer = build_optimizer(net, OptimConfig())
        mean = torch.tensor(CAFFE.mean).view(1, 3, 1, 1)
        self.batches = [(b.image.flip(1).float() - mean, b.label.long()) for b in batches]

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for image, label in self.batches:
            image, label = image.to(self.device, memory_format=torch.channels_last), label.to(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                logits = F.interpolate(self.net(image), size=label.shape[1:], mode="bilinear", align_corners=False)
                loss = F.cross_entropy(logits, label, ignore_index=IGNORE_LABEL) / len(self.batches)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


class Ours:
    """This project's step, as training runs it."""

    def __init__(self, net: DeepLabV2, batches: list[Batch], variant: Variant) -> None:
        env = DistEnv()
        net.backbone.recompute = "recompute" in variant.options
        model = prepare_model(
            MultiScale(net),
            env,
            channels_last="nchw" not in variant.options,
            compile="compile" in variant.options,
        )
        self.model, self.compiled = model.train(), "compile" in variant.options
        self.precision = Precision(variant.dtype, env.device)
        self.step = TrainStep(self.model, build_optimizer(net, OptimConfig()), self.precision, CAFFE, IGNORE_LABEL)
        self.batches = batches

    def __call__(self) -> object:
        return self.step(self.batches)


@dataclass
class Spans:
    """Adds up the milliseconds spent inside named calls, waiting for the device at each end."""

    synchronize: Callable[[], None]
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    def around(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        """Return `function`, timed under `name`."""

        def timed(*args: object, **kwargs: object) -> object:
            box: list[object] = []
            timing = interleave(
                {name: lambda: box.append(function(*args, **kwargs))}, rounds=1, warmup=0, synchronize=self.synchronize
            )
            self.milliseconds.setdefault(name, []).append(1e3 * timing[name].median)
            return box[0]

        return timed


def measure_parts(ours: Ours, synchronize: Callable[[], None], repeats: int = 3) -> dict[str, float]:
    """Return mean milliseconds a step of forward, backward, update and the rest (upload, labels, loss)."""
    spans = Spans(synchronize)
    backward, update, forward = ours.precision.backward, ours.precision.step, ours.model.forward
    ours.precision.backward = spans.around("backward", backward)  # type: ignore[method-assign, assignment]
    ours.precision.step = spans.around("update", update)  # type: ignore[method-assign, assignment]
    ours.model.forward = spans.around("forward", forward)  # type: ignore[method-assign]
    whole = interleave({"step": ours}, rounds=repeats, warmup=0, synchronize=synchronize)["step"]
    ours.precision.backward, ours.precision.step, ours.model.forward = backward, update, forward  # type: ignore[method-assign]
    parts = {name: sum(times) / repeats for name, times in spans.milliseconds.items()}
    return {**parts, "rest": 1e3 * sum(whole.seconds) / repeats - sum(parts.values())}


def working_memory_gib(competitor: Callable[[], object], device: torch.device) -> float | None:
    """Return what a step takes beyond what is there before it (weights, momentum): activations and gradients."""
    if device.type != "cuda":
        return None  # a process's peak cannot be told apart by competitor
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    competitor()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured FLOP/s of a large square matrix product: the practical peak."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleave({"matmul": lambda: a @ b}, rounds=10, warmup=2, synchronize=synchronizer(device))["matmul"]
    return 2 * size**3 / times.median
