"""Predictions as images to look at and files to hand in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dist_deeplab.data.legend import GAP, draw_legend
from dist_deeplab.data.voc import PALETTE

_OPACITY = 0.55
_BACKGROUND_NAMES = ("background", "_background_", "bg", "other", "others", "void", "unlabeled", "unlabelled")


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
    total = 3 * width + 2 * GAP
    legend = draw_legend([(class_names[c], PALETTE[c]) for c in np.unique(pred).tolist()], total)
    canvas = Image.new("RGB", (legend.width, height + legend.height), "white")
    for number, shown in enumerate(images):
        canvas.paste(Image.fromarray(shown), (number * (width + GAP), 0))
    canvas.paste(legend, (0, height))
    return canvas
