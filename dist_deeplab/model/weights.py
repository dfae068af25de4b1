"""Weights from a file: recognised by their contents, fitted to our names, with what they expect of their input.

Known families: checkpoints of this project, and torchvision's ResNet-50/101 ImageNet state dicts (backbone only).
"""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_deeplab.errors import UserError, first_line
from dist_deeplab.model.preprocessing import CAFFE, TORCHVISION, Preprocessing

MIN_BACKBONE_COVERAGE = 0.95  # below this, a file that "loads" would leave a silently random network


@dataclass(frozen=True)
class Variant:
    """What a family of weights fixes about the network around it."""

    family: str
    stride_on_1x1: bool
    preprocessing: Preprocessing

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Variant":
        """Return the variant that `to_plain` described."""
        plain = values["preprocessing"]
        preprocessing = Preprocessing(plain["channels"], tuple(plain["mean"]), tuple(plain["std"]))
        return cls(values["family"], values["stride_on_1x1"], preprocessing)


SCRATCH = Variant("random weights", stride_on_1x1=True, preprocessing=CAFFE)


@dataclass(frozen=True)
class Weights:
    """A file's tensors under our names (`backbone.*`, `head.*`), and their variant."""

    path: str
    variant: Variant
    tensors: dict[str, torch.Tensor]


def load_file(path: str | Path) -> Any:
    """Return what `torch.save` wrote, on the CPU, without running any code that the file may hold.

    Raises:
        UserError: no such file, damaged, or holding more than plain values and tensors.
    """
    try:
        return torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no weights file at {path}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values, or is no torch file; save a plain state dict"
        ) from None
    except Exception as error:  # an unpickler that meets arbitrary bytes may raise anything
        raise UserError(f"{path} can't be read as a torch file ({first_line(error)}); is it whole?") from None


def load_weights(path: str | Path) -> Weights:
    """Return the weights in a file, whatever known family they are of.

    Raises:
        UserError: unreadable file, or a family that is not known.
    """
    content = load_file(path)
    if isinstance(content, dict) and str(content.get("format", "")).startswith("dist_deeplab.checkpoint"):
        try:
            return Weights(str(path), Variant.from_plain(content["variant"]), _tensors(content["model"]))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"the checkpoint {path} is incomplete; use another one") from None
    if isinstance(content, dict) and {"conv1.weight", "bn1.weight", "layer4.0.conv1.weight"} <= content.keys():
        tensors = {f"backbone.{k}": tensor for k, tensor in _tensors(content).items() if not k.startswith("fc.")}
        return Weights(str(path), Variant("torchvision ResNet", False, TORCHVISION), tensors)
    raise UserError(
        f"the weights in {path} are of no known family; known: checkpoints of this project, and torchvision's "
        "ResNet-50/101 state dicts"
    )


def _tensors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def fit_weights(net: nn.Module, weights: Weights, *, restore_last: bool) -> str:
    """Copy the weights into the network and return a sentence on what was loaded.

    Args:
        net: a DeepLabV2.
        weights: from `load_weights`.
        restore_last: false leaves the head as it is: for a data set with other classes.

    Raises:
        UserError: under 95 % of the backbone's tensors are there, or some that the model has no place for; shapes that
            differ; a head of another class count (the message names model.restore_last).
    """
    own = net.state_dict()
    taken = {k: v for k, v in weights.tensors.items() if k in own and (restore_last or k.startswith("backbone."))}
    misfits = [k for k, v in taken.items() if v.shape != own[k].shape]
    head_misfits = [k for k in misfits if k.startswith("head.")]
    if head_misfits:
        name = head_misfits[0]
        raise UserError(
            f"the last layer in {weights.path} has {taken[name].shape[0]} classes, the model {own[name].shape[0]} "
            "(data.num_classes); model.restore_last=false starts a new last layer"
        )
    if misfits:
        name = misfits[0]
        raise UserError(
            f"{name} has shape {list(taken[name].shape)} in {weights.path} but {list(own[name].shape)} in the model; "
            "is model.backbone the one these weights are of?"
        )
    wanted = [k for k in own if k.startswith("backbone.") and not k.endswith("num_batches_tracked")]
    missing = [k for k in wanted if k not in taken]
    if len(missing) > (1 - MIN_BACKBONE_COVERAGE) * len(wanted):
        raise UserError(
            f"{weights.path} ({weights.variant.family}) lacks {len(missing)} of the backbone's {len(wanted)} tensors, "
            f"e.g. {missing[0]}; is model.backbone the one these weights are of?"
        )
    unused = [k for k in weights.tensors if k.startswith("backbone.") and k not in own]
    if unused:
        raise UserError(
            f"{weights.path} ({weights.variant.family}) has {len(unused)} backbone tensors that the model has no place "
            f"for, e.g. {unused[0]}; is model.backbone the one these weights are of?"
        )
    net.load_state_dict(taken, strict=False)
    head = [k for k in own if k.startswith("head.")]
    random_head = "" if all(k in taken for k in head) else "; the last layer starts random"
    return (
        f"{weights.path} ({weights.variant.family}): {len(wanted) - len(missing)} of {len(wanted)} backbone tensors, "
        f"{sum(k in taken for k in head)} of {len(head)} of the last layer{random_head}"
    )
