"""Some samples as tensors, and how single ones become a batch."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from dist_deeplab.errors import UserError


class BadSample(NamedTuple):
    """A sample that could not be used and was replaced: which one, and what is wrong with it."""

    sample: str
    problem: str


@dataclass
class Batch:
    """Some samples of one size.

    image: uint8 [B, 3, H, W] RGB in channels-last memory; label: uint8 [B, H, W]; content: int64 [B, 2], height and
    width of the part at the top left that shows the sample, the rest is padding; keys: names for error messages; bad:
    samples in whose place others are; bands: uint8 [B, H, W], for evaluation, how near to a border each pixel is
    (`evaluation/accumulator.py`; computed in the loader's workers, 0 in the padding).
    """

    image: torch.Tensor
    label: torch.Tensor
    content: torch.Tensor
    keys: list[str]
    bad: list[BadSample] = field(default_factory=list)
    bands: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader where a GPU will take the batch."""
        bands = None if self.bands is None else self.bands.pin_memory()
        return Batch(
            self.image.pin_memory(), self.label.pin_memory(), self.content.pin_memory(), self.keys, self.bad, bands
        )


def to_batch(key: str, image: np.ndarray, label: np.ndarray, content: tuple[int, int]) -> Batch:
    """One sample, image [H, W, 3] and label [H, W], as a batch of one."""
    return Batch(
        image=torch.from_numpy(image)[None].permute(0, 3, 1, 2),
        label=torch.from_numpy(label)[None],
        content=torch.tensor([content], dtype=torch.int64),
        keys=[key],
    )


def blank_batch(num_images: int, size: int) -> Batch:
    """`num_images` black images of `size` x `size`, labelled 0; a batch without any is valid too."""
    return Batch(
        image=torch.zeros(num_images, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        label=torch.zeros(num_images, size, size, dtype=torch.uint8),
        content=torch.full((num_images, 2), size, dtype=torch.int64),
        keys=["blank"] * num_images,
    )


def collate(items: "list[Batch | UserError]") -> "Batch | UserError":
    """Batches of one size as a single batch, or the first error among them."""
    samples = []
    for item in items:
        if isinstance(item, UserError):
            return item
        samples.append(item)
    return Batch(
        image=torch.cat([s.image for s in samples]),
        label=torch.cat([s.label for s in samples]),
        content=torch.cat([s.content for s in samples]),
        keys=[key for s in samples for key in s.keys],
        bad=[bad for s in samples for bad in s.bad],
        bands=torch.cat([s.bands for s in samples if s.bands is not None]) if samples[0].bands is not None else None,
    )
