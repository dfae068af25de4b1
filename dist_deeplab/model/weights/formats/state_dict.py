"""State dicts of PyTorch networks, recognised by keys and shapes, under our names.

Two ways of naming a bottleneck ResNet are known: torchvision's, which is also ours, timm's, mmsegmentation's and
isht7's, and kazuto1011's. A network may be under any prefix (`module.`, `backbone.`, `Scale.`, `base.`, ...).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError
from dist_deeplab.model.preprocessing import CAFFE_ROUNDED, TORCHVISION
from dist_deeplab.model.weights.formats.torch_file import KNOWN, NamedTensors
from dist_deeplab.model.weights.variant import Variant, Weights

_PARAMETER = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_TORCHVISION = re.compile(rf"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.{_PARAMETER}")
_KAZUTO_STEM = re.compile(rf"layer1\.conv1\.(conv|bn)\.{_PARAMETER}")
_KAZUTO_BLOCK = re.compile(
    rf"layer([2-5])\.block(\d+)\.(reduce|conv3x3|increase|shortcut|proj)\.(conv|bn)\.{_PARAMETER}"
)
_KAZUTO_PLACES = {
    "reduce": ("conv1", "bn1"),
    "conv3x3": ("conv2", "bn2"),
    "increase": ("conv3", "bn3"),
    "shortcut": ("downsample.0", "downsample.1"),
    "proj": ("downsample.0", "downsample.1"),  # until 2018
}


def torchvision_name(name: str) -> str | None:
    """Our name of a tensor in torchvision's or isht7's network, or None if ours has no such tensor."""
    if head := re.fullmatch(r"layer5\.conv2d_list\.([0-3])\.(weight|bias)", name):  # isht7: Classifier_Module
        return f"head.branches.{head[1]}.{head[2]}"
    if _TORCHVISION.fullmatch(name) or re.match(r"(conv1|bn1|layer[1-4])\.", name):
        return f"backbone.{name}"  # what ours has no place for inside a stage is refused when it is fitted
    return None


def kazuto_name(name: str) -> str | None:
    """Our name of a tensor in kazuto1011's network, or None if ours has no such tensor."""
    if stem := _KAZUTO_STEM.fullmatch(name):
        return f"backbone.{'conv1' if stem[1] == 'conv' else 'bn1'}.{stem[2]}"
    if found := _KAZUTO_BLOCK.fullmatch(name):
        place = _KAZUTO_PLACES[found[3]][found[4] == "bn"]
        return f"backbone.layer{int(found[1]) - 1}.{int(found[2]) - 1}.{place}.{found[5]}"
    if head := re.fullmatch(r"aspp\.(?:stages\.)?c([0-3])\.(weight|bias)", name):
        return f"head.branches.{head[1]}.{head[2]}"
    return f"backbone.{name}" if re.match(r"layer[1-5]\.", name) else None


@dataclass(frozen=True)
class Layout:
    """A naming scheme: tensors that every network of it has, and our name for each."""

    name: str
    anchors: tuple[str, ...]
    translate: Callable[[str], str | None]

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """Prefixes under which a whole network of this layout is found."""
        known = set(names)
        ends = [name[: -len(self.anchors[0])] for name in known if name.endswith(self.anchors[0])]
        return sorted(
            prefix
            for prefix in ends
            if (not prefix or prefix.endswith(".")) and all(prefix + anchor in known for anchor in self.anchors)
        )

    def num_fitting(self, names: Iterable[str]) -> int:
        """Number of names that end like names of this layout, whatever their prefix."""
        pattern = re.compile(r"(?:^|.*\.)(conv1|layer\d\..*)")
        tails = (pattern.fullmatch(name) for name in names)
        return sum(1 for tail in tails if tail and self._is_exact(tail[1]))

    def _is_exact(self, name: str) -> bool:
        ours = self.translate(name)
        return ours is not None and bool(re.fullmatch(rf"(backbone|head)\..*\.{_PARAMETER}", ours))


TORCHVISION_LAYOUT = Layout(
    "torchvision ResNet",
    ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv3.weight"),
    torchvision_name,
)
KAZUTO_LAYOUT = Layout(
    "kazuto1011 DeepLab-v2",
    ("layer1.conv1.conv.weight", "layer2.block1.reduce.conv.weight", "layer5.block1.increase.conv.weight"),
    kazuto_name,
)


def recognise(content: NamedTensors, path: Path) -> Weights:
    """A state dict's tensors under our names.

    Raises:
        UserError: of no known family (the nearest is named), of a network that ours can't be, or two in one file.
    """
    names = content.tensors.keys()
    _refuse_other_resnets(content.tensors, path)
    for layout in (KAZUTO_LAYOUT, TORCHVISION_LAYOUT):
        prefixes = layout.prefixes(names)
        if len(prefixes) > 1:
            under = ", ".join(repr(prefix) for prefix in prefixes[:5])
            raise UserError(f"{path} holds {len(prefixes)} networks, under {under}; keep one of them")
        if prefixes:
            variant = content.variant or _family(layout, prefixes[0], content.tensors, path)
            return _translated(content.tensors, layout, prefixes[0], variant, path)
    layout = max((TORCHVISION_LAYOUT, KAZUTO_LAYOUT), key=lambda layout: layout.num_fitting(names))
    num = layout.num_fitting(names)
    nearest = f"; the nearest is {layout.name}, which {num} of its {len(names)} names resemble" if num else ""
    raise UserError(
        f"the weights in {path} are of no known family{nearest}; its names begin with "
        f"{', '.join(list(names)[:3])}; {KNOWN}"
    )


def _family(layout: Layout, prefix: str, tensors: dict[str, torch.Tensor], path: Path) -> Variant:
    """Variant, recognised by the keys beside the backbone."""
    if layout is KAZUTO_LAYOUT:
        return Variant("kazuto1011 DeepLab-v2", True, CAFFE_ROUNDED)
    if f"{prefix}layer5.conv2d_list.0.weight" in tensors or prefix.endswith("Scale."):
        return Variant("isht7 DeepLab-v2", True, CAFFE_ROUNDED)
    outside = prefix.removesuffix("backbone.")
    if outside != prefix:
        beside = {name[len(outside) :].split(".")[0] for name in tensors if name.startswith(outside)}
        if "decode_head" in beside:
            return Variant("mmsegmentation ResNet", False, TORCHVISION, contract_dilation=True)
        if "classifier" in beside:
            return Variant("torchvision DeepLabV3 ResNet", False, TORCHVISION, contract_dilation=True)
        if f"{outside}head.branches.0.weight" in tensors:
            raise UserError(
                f"{path} is a bare state dict of this project, which does not say what input its network wants; use "
                f"the checkpoint it came from, or what `{command_name('convert-weights')}` made of that"
            )
    return Variant("torchvision ResNet", False, TORCHVISION)


def _translated(tensors: dict[str, torch.Tensor], layout: Layout, prefix: str, variant: Variant, path: Path) -> Weights:
    ours: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    skipped: dict[str, str] = {}
    outside = prefix.removesuffix("backbone.")
    for name, tensor in tensors.items():
        target = layout.translate(name[len(prefix) :]) if name.startswith(prefix) else None
        if target is None and re.fullmatch(r"head\.branches\.[0-3]\.(weight|bias)", name[len(outside) :]):
            target = name[len(outside) :]  # an export of ours
        if target is None:
            skipped[name] = "not part of our network"
        elif target in ours:
            raise UserError(f"{path} holds {sources[target]} and {name}, which are the same tensor here; keep one")
        else:
            ours[target], sources[target] = tensor, name
    return Weights(str(path), variant, ours, {k: v for k, v in sources.items() if k != v}, skipped)


def _refuse_other_resnets(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse ResNets that are named like ours and compute something else.

    Raises:
        UserError: deep stem, basic blocks, grouped or wide bottlenecks.
    """

    def shape(end: str) -> tuple[int, ...] | None:
        found = [tensor.shape for name, tensor in tensors.items() if name == end or name.endswith(f".{end}")]
        return tuple(found[0]) if found else None

    reason = ""
    inner, middle, stem = shape("layer1.0.conv1.weight"), shape("layer1.0.conv2.weight"), shape("bn1.weight")
    if shape("layer4.0.conv1.weight") is None or inner is None:
        return
    if shape("stem.0.weight") or shape("conv1.0.weight") or shape("stem.conv1.weight"):
        reason = (
            "has a deep stem of three 3x3 convolutions (ResNet-C or -D: resnet101d, ResNetV1c); DeepLab-v2's is 7x7"
        )
    elif shape("layer4.0.conv3.weight") is None:
        reason = "is built of basic blocks (ResNet-18 or -34); DeepLab-v2's are bottlenecks"
    elif middle and len(middle) == 4 and middle[0] != middle[1]:
        reason = "has grouped convolutions (ResNeXt)"
    elif stem and len(inner) == 4 and inner[0] != stem[0] and inner[1] == stem[0]:
        reason = "has wide bottlenecks (Wide ResNet)"
    if reason:
        raise UserError(
            f"the network in {path} {reason}, so its weights can't be used here; use a plain ResNet-50 or -101"
        )
