"""One optimizer step, ours against the two loops that others write, on the same images and network.

eager: float32, contiguous NCHW images normalised on the CPU, labels resized on the CPU, plain SGD, the loss read back
every step. amp: autocast (bf16) and channels-last memory, logits upsampled to the image and scored there, the loss
read back every step (the form of torchvision's segmentation reference). Both train the network in torch's layers
alone: four convolutions as the head, batch norm in passes of its own. ours_*: this project's `TrainStep`, as training
runs it. Loading is not in it (see `loader`; what training waits for it, `--dry-run` tells); uploading is.

    python tools/benchmark.py step --ours each alone        # a row for each choice, together with all and by itself
    torchrun --standalone --nproc_per_node 2 tools/benchmark.py step --ours each     # those between ranks too
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.competitors import (
    OPTIONS,
    PRECISIONS,
    Competitor,
    Ours,
    Variant,
    expand,
    variants,
)
from benchmarks.harness import Report, Row, Timing, interleave, ratio_column, synchronizer
from benchmarks.peers import IGNORE_LABEL, AmpChannelsLast, Fp32Eager, plain_network
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.process_group import DistEnv, process_group
from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.flops import training_flops

SUMMARY = "an optimizer step: images/s, parts, memory, share of the matmul peak"
NUM_CLASSES = 21


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet101" if on_gpu else "resnet_tiny", help="default: %(default)s")
    parser.add_argument("--crop", type=int, default=321 if on_gpu else 65, help="pixels, 8k+1; default: %(default)s")
    parser.add_argument(
        "--images", type=int, default=10 if on_gpu else 4, help="images of a step; default: %(default)s"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step; default: %(default)s")
    parser.add_argument(
        "--batch-norm", default="local", choices=["local", "frozen"], help="of all rows; default: %(default)s"
    )
    parser.add_argument(
        "--ours",
        nargs="+",
        type=variants,
        default=[Variant("fp32"), Variant("bf16")],
        metavar="DTYPE[+OPTION...]",
        help=f"ours in {', '.join(PRECISIONS)}, with any of {', '.join(OPTIONS)}; each: all together, and with each "
        "choice taken back or option put on; alone: none, and each by itself; default: fp32 bf16",
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=["eager", "amp"], help="leave out a baseline (amp is slow on a CPU)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each; default: %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    if arguments.images % arguments.accumulation:
        raise UserError(f"--images {arguments.images} is not a multiple of --accumulation {arguments.accumulation}")
    env = DistEnv.from_environ()
    ours = expand(arguments.ours, on_gpu=torch.cuda.is_available(), ranks=env.world_size)
    with process_group(env):
        return measure(arguments, env, ours)


def measure(arguments: argparse.Namespace, env: DistEnv, ours: list[Variant]) -> Report:
    """The table; every rank calls it."""
    device = env.device
    torch.manual_seed(0)
    net = DeepLabV2(arguments.backbone, NUM_CLASSES, norm=norm_factory(arguments.batch_norm))
    batches = draw_batches(arguments.images // arguments.accumulation, arguments.accumulation, arguments.crop)
    competitors: dict[str, Competitor] = {
        "eager": Fp32Eager(plain_network(net, arguments.backbone), batches, env),
        "amp": AmpChannelsLast(plain_network(net, arguments.backbone), batches, env),
        **{variant.name: Ours(copy.deepcopy(net), batches, env, variant) for variant in ours},
    }
    for skipped in arguments.without:
        competitors.pop(skipped, None)
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
            **row(name, timing, competitors[name], arguments, flops=flops, peak=peak, env=env),
            "first_s": first[name].median,
        }
        for name, timing in timings.items()
    ]
    for peer in ("eager", "amp"):
        if peer in competitors:
            ratio_column(rows, of="images_per_s", to=peer, name=f"x_{peer}")
    shape = f"{arguments.images} x {arguments.crop} x {arguments.crop} in {arguments.accumulation} micro-batches"
    notes = [
        f"{flops / 1e9:.3g} GFLOP an image, forward and backward (two a multiply-add, convolutions only)",
        f"matmul peak measured: {peak / 1e12:.3g} TFLOP/s in {'bf16' if device.type == 'cuda' else 'fp32'}",
        "first_s: the first step, with what is loaded, compiled and chosen in it",
        "parts are measured one step at a time with a wait after each, so they add up to more than the step; data is "
        "the upload, rest the labels and the loss",
        *(f"+{option}: {OPTIONS[option]}" for option in OPTIONS if any(option in one.options for one in ours)),
    ]
    if env.world_size > 1:
        notes.append(f"{env.world_size} ranks with such a share each; batch norm is per rank (see batch_norm)")
    return Report(f"optimizer step of {arguments.backbone}, {shape}", rows, notes)


def row(
    name: str,
    timing: Timing,
    competitor: Competitor,
    arguments: argparse.Namespace,
    *,
    flops: int,
    peak: float,
    env: DistEnv,
) -> Row:
    """The table's row of a competitor; images/s are of all ranks."""
    rate = env.world_size * arguments.images / timing.median
    has_parts = isinstance(competitor, Ours) and not competitor.compiled  # a compiled graph is one piece
    parts = measure_parts(competitor, synchronizer(env.device)) if isinstance(competitor, Ours) and has_parts else {}
    return {
        "what": name,
        "images_per_s": rate,
        "step_ms": 1e3 * timing.median,
        "spread": timing.spread,
        **{f"{part}_ms": parts.get(part) for part in ("data", "forward", "backward", "collectives", "update", "rest")},
        "work_gib": working_memory_gib(competitor, env.device),
        "of_peak": rate * flops / peak / env.world_size,
    }


def draw_batches(micro_size: int, accumulation: int, crop: int) -> list[Batch]:
    """Micro-batches of random pixels, as the loader gives them; a tenth of the labels is void."""
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


@dataclass
class Spans:
    """Adds up the milliseconds spent inside named calls, waiting for the device at each end."""

    synchronize: Callable[[], None]
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    def around(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        """`function`, timed under `name`."""

        def timed(*args: object, **kwargs: object) -> object:
            box: list[object] = []
            timing = interleave(
                {name: lambda: box.append(function(*args, **kwargs))}, rounds=1, warmup=0, synchronize=self.synchronize
            )
            self.milliseconds.setdefault(name, []).append(1e3 * timing[name].median)
            return box[0]

        return timed


def measure_parts(ours: Ours, synchronize: Callable[[], None], repeats: int = 3) -> dict[str, float]:
    """Mean milliseconds a step of data (its upload), forward, backward, collectives, update and the rest.

    collectives: what backward takes longer than without the sum of gradients over the ranks, so what does not overlap.
    """
    parts = _spans(ours, synchronize, repeats)
    if isinstance(ours.model, DistributedDataParallel):
        with ours.model.no_sync():
            alone = _spans(ours, synchronize, repeats)["backward"]
        parts["collectives"] = max(0.0, parts["backward"] - alone)
        parts["backward"] -= parts["collectives"]
    return parts


def _spans(ours: Ours, synchronize: Callable[[], None], repeats: int) -> dict[str, float]:
    spans = Spans(synchronize)
    backward, update, forward = ours.precision.backward, ours.precision.step, ours.model.forward
    upload = ours.step.copy_to_device
    ours.precision.backward = spans.around("backward", backward)  # type: ignore[method-assign, assignment]
    ours.precision.step = spans.around("update", update)  # type: ignore[method-assign, assignment]
    ours.model.forward = spans.around("forward", forward)
    ours.step.copy_to_device = spans.around("data", upload)  # type: ignore[assignment]
    whole = interleave({"step": ours}, rounds=repeats, warmup=0, synchronize=synchronize)["step"]
    ours.precision.backward, ours.precision.step, ours.model.forward = backward, update, forward  # type: ignore[method-assign]
    ours.step.copy_to_device = upload
    parts = {name: sum(times) / repeats for name, times in spans.milliseconds.items()}
    return {**parts, "rest": 1e3 * sum(whole.seconds) / repeats - sum(parts.values())}


def working_memory_gib(competitor: Callable[[], object], device: torch.device) -> float | None:
    """Memory that a step takes beyond weights and momentum: activations and gradients."""
    if device.type != "cuda":
        return None  # a process's peak cannot be told apart by competitor
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    competitor()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The measured FLOP/s of a large square matrix product: the practical peak."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleave({"matmul": lambda: a @ b}, rounds=10, warmup=2, synchronize=synchronizer(device))["matmul"]
    return 2 * size**3 / times.median
