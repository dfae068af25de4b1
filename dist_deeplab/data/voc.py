"""Facts about PASCAL VOC 2012 segmentation: class names, palette, void label, split sizes.

Sources: the VOC2012 development kit documentation (class order, void label 255, folder layout) and its
`VOClabelcolormap.m` (palette).
"""

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

CLASS_NAMES: tuple[str, ...] = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 21 classes; a class's position is its label index."""

IGNORE_LABEL = 255
"""Void: object borders and difficult objects. Never counts in a loss or a score."""

SPLIT_SIZES: dict[str, int] = {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10582}
"""Images a split has; `train_aug` is VOC train with the SBD annotations, minus VOC val."""


def build_palette() -> np.ndarray:
    """VOC's colour of every label index, uint8 [256, 3] RGB.

    The bits of the index are dealt to the high bits of R, G and B in turn (`VOClabelcolormap.m`), so that
    index 0 is black, 1 is dark red and 255 is (224, 224, 192).
    """
    index = np.arange(256, dtype=np.int64)
    colors = np.zeros((256, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return colors.astype(np.uint8)


PALETTE: np.ndarray = build_palette()
PALETTE.setflags(write=False)


def save_palette_png(label: np.ndarray, file: str | Path | IO[bytes]) -> None:
    """Write class indices, uint8 [H, W], as VOC's own masks are: viewers show colours, Pillow reads the indices."""
    image = Image.fromarray(label)
    image.putpalette(PALETTE.tobytes())
    image.save(file, format="PNG")
