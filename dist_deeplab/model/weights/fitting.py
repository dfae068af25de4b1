"""Recognised weights into a network, all or nothing, with a report per tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dist_deeplab.errors import UserError
from dist_deeplab.model.resnet import SPECS
from dist_deeplab.model.weights.variant import Weights

MIN_BACKBONE_COVERAGE = 0.95  # below this, a file that "loads" would leave a silently random network


@dataclass(frozen=True)
class Report:
    """Which of a file's tensors were loaded. `str` is a sentence, `lines` the whole list."""

    path: str
    family: str
    note: str
    loaded: dict[str, str]
    """Our name -> the name in the file."""
    missing: tuple[str, ...]
    """Our names that the file lacks: they keep the values they had."""
    skipped: dict[str, str]
    """Name in the file -> why it was left there."""
    num_backbone: int
    """The backbone's tensors, batch counters aside."""
    num_head: int

    def __str__(self) -> str:
        def count(names: Iterator[str], part: str) -> int:
            return sum(1 for name in names if name.startswith(part) and not name.endswith("num_batches_tracked"))

        backbone, head = count(iter(self.loaded), "backbone."), count(iter(self.loaded), "head.")
        renamed = sum(1 for ours, theirs in self.loaded.items() if ours != theirs)
        clauses = [
            f"{self.path} ({self.family}): {backbone} of {self.num_backbone} backbone tensors, "
            f"{head} of {self.num_head} of the last layer"
        ]
        clauses += [f"{renamed} renamed"] if renamed else []
        clauses += [f"{len(self.skipped)} skipped ({_some(self.skipped)})"] if self.skipped else []
        lacking = [name for name in self.missing if name.startswith("backbone.")]
        clauses += [f"missing and random: {_some(lacking)}"] if lacking else []
        clauses += ["the last layer starts random"] if head < self.num_head else []
        clauses += [self.note] if self.note else []
        return "; ".join(clauses)

    def lines(self) -> Iterator[str]:
        """One line per tensor: loaded, skipped or missing."""
        yield from (f"loaded   {ours} <- {theirs}" for ours, theirs in self.loaded.items())
        yield from (f"skipped  {theirs}: {reason}" for theirs, reason in self.skipped.items())
        yield from (f"missing  {ours}" for ours in self.missing)


def fit_weights(net: nn.Module, weights: Weights, *, restore_last: bool) -> Report:
    """Copy the weights into the network and return what was loaded.

    Args:
        net: a DeepLabV2.
        weights: from `load_weights`.
        restore_last: false leaves the head as it is: for a data set with other classes.

    Raises:
        UserError: under 95 % of the backbone's tensors are there, or some that the model has no place for; shapes that
            differ; values that are not finite; a head of another class count (the message names model.restore_last).
    """
    own = net.state_dict()
    taken = {k: v for k, v in weights.tensors.items() if k in own and (restore_last or k.startswith("backbone."))}
    _require_same_shapes(weights, taken, own)
    wanted = [k for k in own if k.startswith("backbone.") and not k.endswith("num_batches_tracked")]
    lacking = [k for k in wanted if k not in taken]
    if len(lacking) > (1 - MIN_BACKBONE_COVERAGE) * len(wanted):
        raise UserError(
            f"{weights.path} ({weights.variant.family}) lacks {len(lacking)} of the backbone's {len(wanted)} tensors, "
            f"e.g. {lacking[0]}; {_remedy(weights)}"
        )
    unused = [k for k in weights.tensors if k.startswith("backbone.") and k not in own]
    if unused:
        raise UserError(
            f"{weights.path} ({weights.variant.family}) has {len(unused)} backbone tensors that the model has no place "
            f"for, e.g. {unused[0]}; {_remedy(weights)}"
        )
    head = [k for k in own if k.startswith("head.")]
    if 0 < sum(k in taken for k in head) < len(head):
        absent = next(k for k in head if k not in taken)
        raise UserError(
            f"{weights.path} has a part of the last layer only and lacks {absent}; set model.restore_last=false"
        )
    _require_sound_values(weights, taken)
    net.load_state_dict(taken, strict=False)
    left = {
        weights.sources.get(k, k): "model.restore_last=false" for k in weights.tensors if k in own and k not in taken
    }
    return Report(
        path=weights.path,
        family=weights.variant.family,
        note=weights.variant.note,
        loaded={k: weights.sources.get(k, k) for k in taken},
        missing=tuple(k for k in own if k not in taken and not k.endswith("num_batches_tracked")),
        skipped=weights.skipped | left,
        num_backbone=len(wanted),
        num_head=len(head),
    )


def backbone_of(tensors: dict[str, torch.Tensor]) -> str | None:
    """Name of our backbone with the blocks and channels of these tensors, or None."""
    blocks = [0, 0, 0, 0]
    for name in tensors:
        part, _, rest = name.partition(".layer")
        stage, block = (rest.split(".") + ["", ""])[:2]
        if part == "backbone" and stage in ("1", "2", "3", "4") and block.isdecimal() and len(block) < 4:
            blocks[int(stage) - 1] = max(blocks[int(stage) - 1], int(block) + 1)
    stem = tensors.get("backbone.conv1.weight")
    for name, spec in SPECS.items():
        if spec.blocks == tuple(blocks) and stem is not None and stem.ndim == 4 and stem.shape[0] == spec.width:
            return name
    return None


def _require_same_shapes(weights: Weights, taken: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    misfits = sorted((k for k, v in taken.items() if v.shape != own[k].shape), key=lambda k: not k.startswith("head."))
    if not misfits:
        return
    name = misfits[0]
    theirs, ours = list(taken[name].shape), list(own[name].shape)
    if name.startswith("head.") and theirs[:1] != ours[:1] and theirs[1:] == ours[1:]:
        raise UserError(
            f"the last layer in {weights.path} has {theirs[0] if theirs else 0} classes, the model {ours[0]} "
            "(data.num_classes); model.restore_last=false starts a new last layer"
        )
    raise UserError(
        f"{weights.sources.get(name, name)} has shape {theirs} in {weights.path} but {ours} in the model; "
        f"{_remedy(weights)}"
    )


def _require_sound_values(weights: Weights, taken: dict[str, torch.Tensor]) -> None:
    for name, tensor in taken.items():
        theirs = weights.sources.get(name, name)
        if tensor.is_complex() or (not tensor.is_floating_point() and not name.endswith("num_batches_tracked")):
            raise UserError(f"{theirs} in {weights.path} is of type {tensor.dtype}, not floating point")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{theirs} in {weights.path} holds NaN or infinity; use another file")
        if name.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{theirs} in {weights.path} holds negative variances; use another file")


def _remedy(weights: Weights) -> str:
    name = backbone_of(weights.tensors)
    if name:
        return f"it looks like {name}: set model.backbone={name}, or use another file"
    return "is model.backbone the one these weights are of?"


def _some(names: "dict[str, str] | list[str]") -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
