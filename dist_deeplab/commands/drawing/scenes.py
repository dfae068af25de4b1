"""Scenes: a place, and objects of the classes that occur there, with their label."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from dist_deeplab.commands.drawing.objects import CLASSES, Array, Color, Patch, noise, pick
from dist_deeplab.data import voc

SCALE = 3
"""Scenes are drawn this many times larger, then averaged down: smooth outlines."""
SIZES = ((160, 120), (120, 160), (192, 128), (128, 192), (144, 144), (176, 132), (132, 176), (160, 112), (160, 160))
"""Image sizes (width, height) in pixels."""

Placed = tuple[int, int, str, Patch]  # an object in a scene: bottom and left in pixels, class, patch


class Setting(NamedTuple):
    """A place, the classes that occur in it, and what the part above its horizon ends with."""

    classes: tuple[str, ...]
    upper: tuple[Color, Color]  # the wall's or sky's colour at the top and at the horizon
    lower: tuple[Color, Color]  # the ground's at the horizon and at the bottom
    horizon: tuple[float, float]  # its row's range, a fraction of the image's height
    cells: tuple[int, int]  # of the ground's noise (down, across): waves, grass, gravel or planks
    behind: str


SKY, HAZE = ((70, 130, 205), (195, 222, 240)), ((175, 190, 205), (215, 210, 205))
SEA, MEADOW, ROAD = ((70, 125, 160), (25, 70, 115)), ((125, 165, 75), (70, 120, 40)), ((120, 120, 122), (85, 85, 90))
PAPER, PLANKS = ((205, 190, 165), (190, 172, 148)), ((150, 105, 65), (115, 75, 42))
PLASTER, CARPET = ((135, 165, 175), (115, 145, 160)), ((190, 180, 165), (150, 140, 128))
SETTINGS = (
    Setting(("aeroplane",), SKY, MEADOW, (0.86, 0.95), (24, 24), "hills"),
    Setting(("boat", "boat", "aeroplane"), SKY, SEA, (0.35, 0.55), (50, 7), "hills"),
    Setting(("sheep", "sheep", "bus", "aeroplane"), SKY, MEADOW, (0.3, 0.5), (45, 90), "hills"),
    Setting(("bus", "pottedplant"), HAZE, ROAD, (0.4, 0.55), (80, 80), "roofs"),
    Setting(("bottle", "tvmonitor", "pottedplant"), PAPER, PLANKS, (0.5, 0.65), (60, 4), "stripes"),
    Setting(("tvmonitor", "bottle", "sheep"), PLASTER, CARPET, (0.5, 0.65), (30, 30), "stripes"),
)


def draw_background(rng: Generator, setting: Setting, shape: tuple[int, int]) -> tuple[Array, int]:
    """The empty place, float32 [H, W, 3], and the horizon's row."""
    height, width = shape
    horizon, image = int(rng.uniform(*setting.horizon) * height), np.empty((height, width, 3), np.float32)
    upper, lower = image[:horizon], image[horizon:]
    for part, colors in ((upper, setting.upper), (lower, setting.lower)):
        part[:] = np.linspace(pick(rng, colors[0]), pick(rng, colors[1]), len(part))[:, None]
    lower += 11 * noise(rng, lower.shape, setting.cells) + 5 * noise(rng, lower.shape, (6, 6))
    if setting.behind == "stripes":
        stripes = np.sin(np.arange(width) * rng.uniform(14, 40) / width + 1) > 0
        upper += 8 * rng.integers(2) * stripes[:, None] + 3 * noise(rng, upper.shape, (60, 60))
        return image, horizon
    clouds = noise(rng, upper.shape, (4, 4)) + 0.6 * noise(rng, upper.shape, (12, 10))
    upper += (245 - upper) * np.clip(clouds * 0.45 - 0.1, 0, 0.7)
    top = 0.03 + 0.03 * noise(rng, (1, width), (1, 7))[0, :, 0]
    if setting.behind == "roofs":
        top = np.repeat(rng.uniform(0.03, 0.22, 9), width // 9 + 1)[:width]
    hidden = np.arange(horizon)[:, None] > horizon - height * top
    upper[hidden] = upper[hidden] * 0.4 + 0.5 * np.array(setting.lower[1])
    return image, horizon


def draw_object(rng: Generator, name: str, short_side: int) -> Patch:
    """Draw one object, large or small, flipped or not and a little turned."""
    draw, relative = CLASSES[name]
    rgb, mask = draw(rng, int(short_side * relative * rng.uniform(0.46, 0.72)))
    angle, pad, side = rng.normal(0, 10 if name == "aeroplane" else 2), max(mask.shape) // 6, rng.choice((-1, 1))
    rgb, alpha = np.pad(rgb, ((pad, pad), (pad, pad), (0, 0)))[:, ::side], np.pad(mask, pad)[:, ::side]
    turn = cv2.getRotationMatrix2D((alpha.shape[1] / 2, alpha.shape[0] / 2), angle, 1)
    rgb, alpha = (cv2.warpAffine(a, turn, alpha.shape[::-1], flags=0) for a in (rgb, alpha.astype(np.uint8)))
    x, y, width, height = cv2.boundingRect(alpha)
    return rgb[y : y + height, x : x + width], alpha[y : y + height, x : x + width].astype(bool)


def arrange(rng: Generator, names: list[str], shape: tuple[int, int], horizon: int) -> list[Placed]:
    """Draw the objects and find them places, the farthest first.

    The first always finds one; another is left out if a fifth of its box is still taken after 20 tries.
    """
    placed, taken = [], np.zeros(shape, bool)
    for name in names:
        patch = draw_object(rng, name, min(shape))
        h, w = patch[1].shape
        for _ in range(20):
            bottom = int(rng.uniform(h, max(h + 1, horizon)))  # of what flies; the rest stands below the horizon
            if name != "aeroplane":
                bottom = int(max(0.85 * h, horizon + rng.uniform(0.12, 1) * (shape[0] - horizon)))
            left = int(rng.uniform(*sorted((-0.12 * w, shape[1] - 0.88 * w))))
            box = taken[max(0, bottom - h) : bottom, max(0, left) : left + w]
            if box.mean() < 0.2:
                placed.append((bottom, left, name, patch))
                box[:] = True
                break
    return sorted(placed, key=lambda item: (item[2] != "aeroplane", item[0]))


def draw_scene(seed: int, index: int, first: str) -> Patch:
    """Draw image `index`, with an object of class `first` in it: uint8 [H, W, 3] RGB and its label, uint8 [H, W]."""
    rng = np.random.default_rng([seed, index])
    size = SIZES[rng.integers(len(SIZES))]
    shape = (size[1] * SCALE, size[0] * SCALE)
    fitting = [setting for setting in SETTINGS if first in setting.classes]
    setting = fitting[rng.integers(len(fitting))]
    image, horizon = draw_background(rng, setting, shape)
    others = rng.choice(setting.classes, rng.choice(4, p=(0.25, 0.35, 0.25, 0.15))).tolist()
    objects = arrange(rng, [first, *others], shape, horizon)
    instance = np.zeros(shape, np.uint8)
    for number, (bottom, left, name, (rgb, mask)) in enumerate(objects, 1):
        h, w = mask.shape
        if name != "aeroplane":  # its shadow on the ground
            shadow = np.zeros(shape, np.float32)
            cv2.ellipse(shadow, (left + w // 2, bottom - 3), (w // 2, h // 14), 0, 0, 360, (0.45,), -1)
            image *= 1 - cv2.blur(shadow, (15, 15))[..., None]
        y, x = np.nonzero(mask)
        to_y, to_x = y + bottom - h, x + left
        seen = (to_y >= 0) & (to_y < shape[0]) & (to_x >= 0) & (to_x < shape[1])
        image[to_y[seen], to_x[seen]], instance[to_y[seen], to_x[seen]] = rgb[y[seen], x[seen]], number
    down, across = (np.linspace(1 - a, 1 + a, n) for a, n in zip(rng.uniform(-0.15, 0.15, 2), shape, strict=True))
    image *= (np.outer(down, across) * rng.uniform(0.85, 1.1))[..., None]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) + rng.normal(0, 3, (*size[::-1], 3))
    instance = instance[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
    kernel = np.ones((3, 3), np.uint8)
    outline = cv2.dilate(instance, kernel) != cv2.erode(instance, kernel)  # a pixel on either side of every edge
    classes = np.array([0, *(voc.CLASS_NAMES.index(item[2]) for item in objects)], np.uint8)
    return np.clip(small, 0, 255).astype(np.uint8), np.where(outline, np.uint8(voc.IGNORE_LABEL), classes[instance])
