"""Predictions as images to look at and files to hand in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_deeplab.data.voc import PALETTE

_OPACITY = 0.55
_BACKGROUND_NAMES = ("background", "_background_", "bg", "other", "others", "void", "unlabeled", "unlabelled")
_GAP = 6  # pixels between images
_SHOWN_WIDTH = 1600  # pixels of a screen that a wider image is scaled down to: its legend is drawn larger by as much
_LINE, _FONT = 24, 16  # pixels of the legend at that width


def overlay(image: np.ndarray, pred: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """The image uint8 [H, W, 3] with the classes' colours over it; class 0 shows the image alone if it is background.

    Black, the palette's colour of class 0, darkens it where it is a class like the others, e.g. a road.
    """
    import cv2

    mixed = cv2.addWeighted(image, 1 - _OPACITY, PALETTE[pred], _OPACITY, 0)
    if class_names[0].lower() in _BACKGROUND_NAMES:
        mixed[pred == 0] = image[pred == 0]
    return mixed


def side_by_side(image: np.ndarray, pred: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Image, prediction and overlay in a row, above a legend of the classes found."""
    height, width = pred.shape
    images = [image, PALETTE[pred], overlay(image, pred, class_names)]
    total = 3 * width + 2 * _GAP
    legend = _legend([(class_names[c], PALETTE[c]) for c in np.unique(pred).tolist()], total)
    canvas = Image.new("RGB", (total, height + legend.height), "white")
    for number, shown in enumerate(images):
        canvas.paste(Image.fromarray(shown), (number * (width + _GAP), 0))
    canvas.paste(legend, (0, height))
    return canvas


def _legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> Image.Image:
    """Squares of the classes' colours with their names, in lines of `width` pixels."""
    scale = max(1.0, width / _SHOWN_WIDTH)
    line, pad, font = round(scale * _LINE), round(scale * _GAP), ImageFont.load_default(round(scale * _FONT))
    places, x, y = [], pad, 0
    for name, color in entries:
        length = line + int(font.getlength(name)) + 2 * pad
        if x > pad and x + length > width:
            x, y = pad, y + line
        places.append((x, y, name, color))
        x += length
    legend = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, color in places:
        square = (x, y + line // 5, x + 3 * line // 5, y + 4 * line // 5)
        draw.rectangle(square, fill=tuple(color.tolist()), outline="black", width=max(1, round(scale)))
        draw.text((x + line, y + line // 2), name, fill="black", font=font, anchor="lm")
    return legend
