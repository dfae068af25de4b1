"""Weights written for this project and for the networks of others."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from dist_deeplab.errors import UserError
from dist_deeplab.files import replace_file
from dist_deeplab.model.weights.formats.torch_file import METADATA_KEY
from dist_deeplab.model.weights.variant import Variant

_Tensors = dict[str, torch.Tensor]

_KAZUTO_BRANCHES = {
    "conv1": "reduce.conv",
    "bn1": "reduce.bn",
    "conv2": "conv3x3.conv",
    "bn2": "conv3x3.bn",
    "conv3": "increase.conv",
    "bn3": "increase.bn",
    "downsample.0": "shortcut.conv",
    "downsample.1": "shortcut.bn",
}


def to_torchvision(tensors: _Tensors, variant: Variant) -> tuple[_Tensors, list[str]]:
    """The backbone under torchvision's names (no `fc`), and notes for its user."""
    backbone = {name.removeprefix("backbone."): v for name, v in tensors.items() if name.startswith("backbone.")}
    notes = ["load it with strict=False: there is no fc"]
    if variant.stride_on_1x1:
        notes.append(
            "these weights stride on the first 1x1 of layer2.0, torchvision's on the 3x3: set layer2[0].conv1.stride "
            "to (2, 2) and layer2[0].conv2.stride to (1, 1)"
        )
    dilation = "replace_stride_with_dilation=[False, True, True]"
    contracted = (
        "" if variant.contract_dilation else ", with dilation 2 and 4 in the first blocks of layer3 and layer4 too"
    )
    notes.append(f"it is dilated: {dilation}{contracted}")
    return backbone, notes


def to_kazuto(tensors: _Tensors, variant: Variant) -> tuple[_Tensors, list[str]]:
    """The network under the names of kazuto1011's `DeepLabV2_ResNet101_MSC`, and notes for its user.

    Raises:
        UserError: its network would compute something else, or there is no last layer.
    """
    if not variant.stride_on_1x1 or variant.contract_dilation:
        where = "stride on the 3x3" if not variant.stride_on_1x1 else "contract the dilation"
        raise UserError(
            f"these weights ({variant.family}) {where}, which kazuto1011's network does not: it would compute "
            "something else; use --to state_dict or torchvision"
        )
    renamed = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "head":
            _, branch, parameter = rest.split(".")
            renamed[f"base.aspp.c{branch}.{parameter}"] = tensor
        elif rest.startswith("layer"):
            stage, block, place = rest.split(".", 2)
            place, _, parameter = place.rpartition(".")
            prefix = f"base.layer{int(stage.removeprefix('layer')) + 1}.block{int(block) + 1}"
            renamed[f"{prefix}.{_KAZUTO_BRANCHES[place]}.{parameter}"] = tensor
        else:
            module, _, parameter = rest.rpartition(".")
            renamed[f"base.layer1.conv1.{'conv' if module == 'conv1' else 'bn'}.{parameter}"] = tensor
    if "base.aspp.c0.weight" not in renamed:
        raise UserError("there is no last layer in these weights, and kazuto1011's network needs one")
    notes = []
    if variant.preprocessing.channels != "bgr" or variant.preprocessing.std != (1.0, 1.0, 1.0):
        notes.append(f"their input is {variant.preprocessing}, not kazuto1011's BGR minus the mean")
    return renamed, notes


def to_ours(tensors: _Tensors, variant: Variant) -> tuple[_Tensors, list[str]]:
    """The network under our names."""
    return dict(tensors), []


_RENAMED: dict[str, Callable[[_Tensors, Variant], tuple[_Tensors, list[str]]]] = {
    "state_dict": to_ours,
    "safetensors": to_ours,
    "torchvision": to_torchvision,
    "kazuto1011": to_kazuto,
}
FORMATS = tuple(_RENAMED)


def export(tensors: _Tensors, variant: Variant, path: Path, *, to: str) -> list[str]:
    """Write a network's tensors (under our names) as one of `FORMATS`, and return notes for its user.

    The file also names its variant, in metadata that other readers ignore, so that it can be read back.

    Raises:
        UserError: it cannot be written there, or not in that format.
    """
    renamed, notes = _RENAMED[to](tensors, variant)
    content = OrderedDict((name, tensor.contiguous()) for name, tensor in renamed.items())

    def fill(temporary: Path) -> None:
        if to == "safetensors":
            from safetensors.torch import save_file

            save_file(content, temporary, metadata={"format": "pt", METADATA_KEY: json.dumps(variant.to_plain())})
        else:
            # Modules keep their versions here, and load_state_dict passes over what it does not know.
            content._metadata = OrderedDict({"": {METADATA_KEY: variant.to_plain()}})  # type: ignore[attr-defined]
            torch.save(content, temporary)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, fill)
    except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    return notes
