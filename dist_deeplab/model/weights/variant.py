"""What belongs to weights beside their numbers: the network and the input that they were trained with."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dist_deeplab.model.preprocessing import CAFFE, Preprocessing


@dataclass(frozen=True)
class Variant:
    """What a family of weights fixes about the network around it."""

    family: str
    stride_on_1x1: bool
    preprocessing: Preprocessing
    contract_dilation: bool = False
    """The first block of res4 and res5 dilates by half: how torchvision and mmsegmentation dilate a ResNet."""
    note: str = ""
    """Remark that belongs beside every score of these weights, e.g. that they were trained on the validation set."""

    @property
    def geometry(self) -> dict[str, bool]:
        """The arguments that make a `DeepLabV2` of this variant: `DeepLabV2(..., **variant.geometry)`."""
        return {"stride_on_1x1": self.stride_on_1x1, "contract_dilation": self.contract_dilation}

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Variant":
        """The variant that `to_plain` described.

        Raises:
            KeyError, TypeError, ValueError: they do not describe a variant.
        """
        plain = values["preprocessing"]
        mean, std = (tuple(float(value) for value in plain[name]) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or plain["channels"] not in ("rgb", "bgr"):
            raise ValueError("no preprocessing of three channels")
        return cls(
            str(values["family"]),
            bool(values["stride_on_1x1"]),
            Preprocessing(plain["channels"], mean, std),
            bool(values.get("contract_dilation", False)),
            str(values.get("note", "")),
        )


SCRATCH = Variant("random weights", stride_on_1x1=True, preprocessing=CAFFE)


@dataclass(frozen=True)
class Weights:
    """A file's tensors under our names (`backbone.*`, `head.*`), and their variant."""

    path: str
    variant: Variant
    tensors: dict[str, torch.Tensor]
    sources: dict[str, str] = field(default_factory=dict)
    """Our name -> the name in the file, where the two differ."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Name in the file -> why it was left there."""

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain values, for other ranks."""
        return {**vars(self), "variant": self.variant.to_plain()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Weights":
        """The weights that `to_plain` described."""
        return cls(**{**values, "variant": Variant.from_plain(values["variant"])})


class Damaged(Exception):
    """A file's bytes are not what its format demands. The message completes "... can't be read: "."""
