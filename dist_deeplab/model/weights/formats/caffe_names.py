"""The authors' layer names (`res4b22_branch2a`, `bn2a_branch1`, `fc1_voc12_c0`), which Caffe, kaffe and DrSleep share.

Readers hand over tensors named `<layer>/<parameter>`, in torch's layouts, with the parameters `weight` and `bias` of
convolutions and `gamma`, `beta`, `mean` and `variance` of batch norms.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.weights.variant import Variant, Weights

_BLOCK = re.compile(r"(res|bn|scale)([2-5])([a-z])(\d*)_branch(1|2[abc])")
_HEAD = re.compile(r"fc1(?:_(?!res0)[A-Za-z0-9]+)*_c([0-3])")
_OTHER_SCALE = re.compile(r"_res0(75|5)(_|\Z)")
_PLACES = {
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2c": ("conv3", "bn3"),
}
_NORM_PARAMETERS = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}


@dataclass(frozen=True)
class Place:
    """Where a layer's parameters go: module and kind (`conv`, `norm` or `head`)."""

    kind: str
    module: str
    stage: int = 0
    block: int = 0
    branch: str = ""


def place_of(layer: str) -> Place | None:
    """Place of a layer, or None if our network has no such layer."""
    if layer == "conv1":
        return Place("conv", "backbone.conv1")
    if layer in ("bn_conv1", "scale_conv1"):
        return Place("norm", "backbone.bn1")
    if head := _HEAD.fullmatch(layer):
        return Place("head", f"head.branches.{head[1]}")
    found = _BLOCK.fullmatch(layer)
    if not found:
        return None
    kind, stage, letter, number, branch = found.groups()
    if number and letter != "b":  # ResNet-101 counts b1, b2, ..., ResNet-50 continues with c, d, ...
        return None
    block = int(number[:4]) if number else ord(letter) - ord("a")
    norm = kind != "res"
    module = f"backbone.layer{int(stage) - 1}.{block}.{_PLACES[branch][norm]}"
    return Place("norm" if norm else "conv", module, int(stage), block, branch)


def why_skipped(layer: str) -> str:
    """Reason why a layer has no place."""
    return "the same layer at another scale" if _OTHER_SCALE.search(layer) else "not part of our network"


@dataclass(frozen=True)
class LayerTensors:
    """Result of a reader: tensors named `<layer>/<parameter>`, what was skipped, and the kind of network."""

    family: str
    tensors: Mapping[str, torch.Tensor]
    eps: float
    variant: Variant
    sources: Mapping[str, str] = field(default_factory=dict)
    """`<layer>/<parameter>` -> the name in the file, where the two differ."""
    skipped: Mapping[str, str] = field(default_factory=dict)


def weights_of(content: LayerTensors, path: Path) -> Weights:
    """The tensors of layers under our names.

    So that outputs stay the same, a convolution's bias before a batch norm is folded into the mean, and an epsilon that
    is not ours into the variance.

    Raises:
        UserError: not a network of this family, or two layers for one place.
    """
    ours: dict[str, torch.Tensor] = {}
    sources: dict[str, str] = {}
    skipped = dict(content.skipped)
    biases: dict[str, torch.Tensor] = {}
    for name, tensor in content.tensors.items():
        layer, _, parameter = name.rpartition("/")
        theirs = content.sources.get(name, name)
        place = place_of(layer)
        if place is None:
            skipped[theirs] = why_skipped(layer)
            continue
        if place.kind == "conv" and parameter == "bias":
            biases[_norm_of(place)] = tensor
            continue
        target = f"{place.module}.{_NORM_PARAMETERS[parameter] if place.kind == 'norm' else parameter}"
        if target in ours:
            raise UserError(f"{path} holds {sources[target]} and {theirs}, which are the same layer here; keep one")
        ours[target], sources[target] = tensor, theirs
    if not any(name.startswith("backbone.layer4.") for name in ours):
        raise UserError(
            f"the weights in {path} are of no known family; the nearest is {content.family}, but there is no layer "
            f"res5a_branch2a; its names begin with {', '.join(list(content.tensors)[:3])}"
        )
    for module, bias in biases.items():
        mean = ours.get(f"{module}.running_mean")
        if mean is None or mean.shape != bias.shape:
            raise UserError(f"{path} has a convolution with a bias and no batch norm after it, before {module}")
        ours[f"{module}.running_mean"] = mean - bias
    if content.eps != EPS:
        for name in [name for name in ours if name.endswith("running_var")]:
            ours[name] = ours[name] + (content.eps - EPS)
    return Weights(str(path), content.variant, ours, sources, skipped)


def _norm_of(place: Place) -> str:
    """Batch norm after a convolution."""
    if place.module.endswith("downsample.0"):
        return place.module.removesuffix("0") + "1"
    return re.sub(r"conv(\d)$", r"bn\1", place.module)


def to_tensor(array: "np.ndarray[Any, Any]", *, is_hwio: bool = False) -> torch.Tensor:
    """Float32 tensor; `is_hwio`: a kernel in TensorFlow's layout (height, width, in, out) is transposed to torch's."""
    if is_hwio and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
