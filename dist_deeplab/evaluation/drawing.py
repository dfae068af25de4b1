"""Predictions as images to look at and files to hand in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_deeplab.data.voc import PALETTE

_OPACITY = 0.55
_GAP, _LINE, _FONT = 6, 22, 14  # pixels


def overlay(image: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: the image with the classes' colours over it; background stays as it is."""
    mixed = (1 - _OPACITY) * image + _OPACITY * PALETTE[pred]
    return np.where(pred[..., None] == 0, image, mixed.round().astype(np.uint8))


def side_by_side(image: np.ndarray, pred: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Image, prediction and overlay in a row, above a legend of the classes found."""
    height, width = pred.shape
    shots = [image, PALETTE[pred], overlay(image, pred)]
    total = 3 * width + 2 * _GAP
    legend = _legend([(class_names[c], PALETTE[c]) for c in np.unique(pred).tolist()], total)
    canvas = Image.new("RGB", (total, height + legend.height), "white")
    for number, shot in enumerate(shots):
        canvas.paste(Image.fromarray(shot), (number * (width + _GAP), 0))
    canvas.paste(legend, (0, height))
    return canvas


def _legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> Image.Image:
    font = ImageFont.load_default(_FONT)
    places, x, y = [], _GAP, 0
    for name, color in entries:
        length = _LINE + int(font.getlength(name)) + 2 * _GAP
        if x > _GAP and x + length > width:
            x, y = _GAP, y + _LINE
        places.append((x, y, name, color))
        x += length
    legend = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, color in places:
        draw.rectangle((x, y + 4, x + 14, y + _LINE - 4), fill=tuple(color.tolist()), outline="black")
        draw.text((x + _LINE, y + 2), name, fill="black", font=font)
    return legend
