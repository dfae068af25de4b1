"""What a step's memory is made of: a fixed part, and a part of each image; counted, without computing anything."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dist_deeplab.config import RunConfig
from dist_deeplab.logs import format_count
from dist_deeplab.model.batch_norm import FrozenBatchNorm, norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, output_name, scaled_length
from dist_deeplab.model.numerics import AUTOCAST
from dist_deeplab.model.resnet import Bottleneck
from dist_deeplab.model.weights import Variant

_NUM_COUNTED = 10_007
"""Images in the pass that is counted: a prime, so that what has a multiple of it in bytes is of the images."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank's step needs, but for what exists for a moment only.

    fixed: {what: bytes}, however many images a micro-batch has. images: {output name: bytes that are kept for the
    backward pass of one image at that scale}.
    """

    fixed: dict[str, int]
    images: dict[str, int]

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the fixed part."""
        return sum(self.fixed.values())

    @property
    def image_bytes(self) -> int:
        """Bytes of one more image in a micro-batch."""
        return sum(self.images.values())

    def describe(self, micro_size: int, crop_size: int) -> str:
        """A sentence on a micro-batch of `micro_size` images."""
        scales = ", ".join(f"{name} {gib(count)}" for name, count in self.images.items())
        parts = f" ({scales})" if len(self.images) > 1 else ""
        count = format_count(micro_size, "image")
        what = ", ".join(f"{name} {gib(number)}" for name, number in self.fixed.items() if number)
        total = self.fixed_bytes + micro_size * self.image_bytes
        return (
            f"memory of a rank, counted: {gib(self.fixed_bytes)} GiB fixed ({what}) + {gib(self.image_bytes)} GiB for "
            f"each image of {crop_size} kept for backward{parts}; with micro-batches of {count} {gib(total)} GiB"
        )


def estimate_memory(config: RunConfig, variant: Variant) -> MemoryEstimate:
    """The estimate of a run's step; nothing is computed, and no random numbers are drawn."""
    with torch.device("meta"):
        net = temporary_network(config, variant)
    parameters, trained = _bytes(net.parameters()), _bytes(p for p in net.parameters() if p.requires_grad)
    buffers = _bytes(net.buffers())
    lower = AUTOCAST.get(config.precision.dtype)
    net.to(lower or torch.float32)
    kept = {
        output_name(scale): _kept_for_backward(net, scaled_length(config.data.crop_size, scale))
        for scale in sorted(config.multi_scale.scales or (1.0,), reverse=True)
    }
    fixed = {
        "weights": parameters,
        "gradients": trained,
        "momentum": trained if config.optim.momentum else 0,
        "statistics": 2 * buffers,  # and the copy that a skipped step takes back
        "copies of weights": sum(weights for weights, _ in kept.values()) + (_autocast_bytes(net) if lower else 0),
    }
    return MemoryEstimate(fixed, {name: image for name, (_, image) in kept.items()})


def temporary_network(config: RunConfig, variant: Variant) -> DeepLabV2:
    """A network of the run's size whose batch norm talks to nobody."""
    frozen = config.model.batch_norm_used == "frozen"
    net = DeepLabV2(
        config.model.backbone,
        config.data.num_classes,
        norm=norm_factory("frozen" if frozen else "local"),
        recompute=config.speed.recompute,
        **variant.geometry,
    )
    if config.model.train_only == "head":
        net.backbone.requires_grad_(False)
    return net.train()


def _autocast_bytes(net: DeepLabV2) -> int:
    """The bytes of the backbone's weights in lower precision, kept until backward is through with them.

    Not where batch norm is part of them (`convolve_and_normalize`): `_kept_for_backward` sees those.
    """
    frozen = any(isinstance(module, FrozenBatchNorm) for module in net.modules())
    part = frozen and next(net.parameters()).dtype != torch.float16
    return 0 if part else _bytes(m.weight for m in net.backbone.modules() if isinstance(m, nn.Conv2d))


def _kept_for_backward(net: DeepLabV2, length: int) -> tuple[int, int]:
    """The bytes that autograd keeps of a pass, other than weights: for any number of images, and for each.

    With recomputation these are the inputs of the bottlenecks, and all of the largest one, which lives in its turn.
    """
    image = next(net.parameters()).new_empty(_NUM_COUNTED, 3, length, length)
    if not net.backbone.recompute:
        return _kept_by(net, image)
    inputs: list[tuple[nn.Module, torch.Tensor]] = []
    blocks = (module for module in net.modules() if isinstance(module, Bottleneck))
    hooks = [block.register_forward_pre_hook(lambda block, args: inputs.append((block, args[0]))) for block in blocks]
    fixed, each = _kept_by(net, image)
    for hook in hooks:
        hook.remove()
    parts = [(_kept_by(block, x.detach().requires_grad_()), x.untyped_storage().nbytes()) for block, x in inputs]
    own_each, own_fixed = max((kept[1] - has // _NUM_COUNTED, kept[0]) for kept, has in parts)
    return fixed + own_fixed, each + own_each


def _kept_by(module: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """The bytes that autograd keeps of `module(x)`, without the module's own: for any number of images, and for each.

    x: `_NUM_COUNTED` images.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        output = module(x)
    own = {tensor.untyped_storage()._cdata for tensor in module.state_dict().values()}
    del output
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in own]
    of_images = sum(size for size in sizes if size % _NUM_COUNTED == 0)
    return sum(sizes) - of_images, of_images // _NUM_COUNTED


def gib(num_bytes: float) -> str:
    """A number of GiB with three digits, for reading: nothing below a MiB."""
    return f"{num_bytes / 2**30:.3g}" if num_bytes >= 2**20 or num_bytes == 0 else "<0.001"


def images_that_fit(memory: float, fixed: float, image: float) -> int:
    """Size of the largest micro-batch that fits into `memory` bytes, of which `fixed` are needed without an image."""
    return max(0, math.floor((memory - fixed) / image))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
