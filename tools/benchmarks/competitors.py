"""Our own step as a competitor of `step`, with choices put on, left out or taken back."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers import IGNORE_LABEL, flags, unfused
from dist_deeplab.config import OptimConfig
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.parallel import prepare_model
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.cuda_graph import graph_network
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
OPTIONS = {
    "nchw": "contiguous memory instead of channels-last (speed.channels_last=false)",
    "nobench": "cuDNN's default algorithms (speed.cudnn_benchmark=false)",
    "foreach": "SGD by lists of tensors instead of fused",
    "forloop": "SGD tensor by tensor instead of fused",
    "noupload": "uploads on the compute stream",
    "recompute": "speed.recompute=true",
    "compile": "speed.compile=true",
    "compress": "speed.compress_gradients=true; on several ranks",
    "static": "speed.static_graph=true; on several ranks",
    "graph": "speed.cuda_graph=true; one process on a GPU",
}
_ON_GPUS, _ON_RANKS = ("nobench", "noupload", "graph"), ("compress", "static")
_TAKEN_BACK = ("nchw", "nobench", "forloop", "noupload")  # what is a choice of ours by default
_EXCLUDE = ({"foreach", "forloop"}, {"recompute", "compile"}, {"graph", "compile"}, {"graph", "recompute"})


@dataclass(frozen=True)
class Variant:
    """A way to run our step: a `precision.dtype`, and OPTIONS."""

    dtype: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the table calls it."""
        return "+".join((f"ours_{self.dtype}", *self.options))


def variants(text: str) -> str | Variant:
    """Read `bf16+compile+recompute`, or `each` or `alone` (see `expand`)."""
    if text in ("each", "alone"):
        return text
    dtype, *options = text.split("+")
    if dtype not in PRECISIONS or not set(options) <= set(OPTIONS) or any(both <= set(options) for both in _EXCLUDE):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither each, alone, nor one of {', '.join(PRECISIONS)} with some of {', '.join(OPTIONS)} "
            "added that go together, e.g. bf16+nchw+recompute"
        )
    return Variant(dtype, tuple(options))


def expand(wanted: list[str | Variant], *, on_gpu: bool, ranks: int) -> list[Variant]:
    """The variants, `each` and `alone` replaced by what they stand for here, each variant once.

    each: ours, with one choice taken back or one option put on at a time: what each gives together with all others.
    alone: plain, with all choices taken back, and plain with one of them at a time: what each gives by itself.

    Raises:
        UserError: an option that does nothing here.
    """
    dtype = "bf16" if on_gpu else "fp32"
    here = [o for o in OPTIONS if (on_gpu or o not in _ON_GPUS) and (ranks > 1 or o not in _ON_RANKS)]
    here = [option for option in here if option != "graph" or ranks == 1]  # synchronised batch norm communicates
    plain = [option for option in _TAKEN_BACK if option in here]
    each = [Variant(dtype), *(Variant(dtype, (option,)) for option in here)]
    alone = [Variant("fp32", tuple(plain))]
    alone += [Variant("fp32", tuple(other for other in plain if other != option)) for option in plain]
    alone += [
        Variant("fp32", (*plain, option)) for option in here if option in ("recompute", "compile", "graph", *_ON_RANKS)
    ]
    if on_gpu:
        each += [Variant(other) for other in PRECISIONS if other != dtype]
        alone += [Variant(other, tuple(plain)) for other in PRECISIONS if other != "fp32"]
    found: list[Variant] = []
    for item in wanted:
        found += each if item == "each" else alone if item == "alone" else [item] if isinstance(item, Variant) else []
    for variant in found:
        useless = [option for option in variant.options if option not in here]
        if useless:
            where = "a GPU" if useless[0] in _ON_GPUS else "several ranks: torchrun ... tools/benchmark.py step"
            where = "one process on a GPU" if useless[0] == "graph" else where
            raise UserError(f"{variant.name[5:]}: {useless[0]} does nothing here; it needs {where}")
    return list(dict.fromkeys(found))


class Ours:
    """This project's step, as training runs it but for what the variant changes."""

    def __init__(self, net: DeepLabV2, batches: list[Batch], env: DistEnv, variant: Variant) -> None:
        options = set(variant.options)
        net.backbone.recompute = "recompute" in options
        model = prepare_model(
            MultiScale(net),
            env,
            channels_last="nchw" not in options,
            compile="compile" in options,
            compress_gradients="compress" in options,
            static_graph="static" in options,
        )
        self.model, self.compiled = model.train(), "compile" in options
        lower = variant.dtype != "fp32"
        self.flags = {"benchmark": "nobench" not in options, "tf32_matmul": lower, "tf32_conv": lower}
        self.precision = Precision(variant.dtype, env.device)
        optimizer = build_optimizer(net, OptimConfig())
        if options & {"foreach", "forloop"}:
            optimizer = unfused(optimizer, foreach="foreach" in options)
        if "graph" in options:
            random_images = batches[0].image.to(env.device).float() / 128 - 1
            graph_network(self.model, random_images, variant.dtype)
        self.step = TrainStep(self.model, optimizer, self.precision, CAFFE, CrossEntropy(IGNORE_LABEL))
        if "noupload" in options:
            self.step.copy_to_device = lambda *tensors: [t.to(env.device, non_blocking=True) for t in tensors]  # type: ignore[assignment]
        self.batches = batches
        if env.world_size > 1:  # as training does; static_graph relies on it
            micro_size, *_, crop_size = batches[0].label.shape
            self.step.warm_up(micro_size=micro_size, crop_size=crop_size)

    def __call__(self) -> object:
        with flags(**self.flags):
            return self.step(self.batches)


Competitor = Callable[[], object]
