"""One object of a class at a time, alone: its image and where it is."""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

Array = np.ndarray[Any, np.dtype[Any]]
Color = tuple[int, int, int] | Array  # RGB, 0 to 255
Patch = tuple[Array, Array]  # an object alone: uint8 [h, w, 3] RGB, and where it is, bool [h, w]
Pair = tuple[float, float]  # x and y


class Sketch:
    """An object being drawn. Lengths and places are fractions of `size` pixels; x to the right, y down."""

    def __init__(self, size: int, width: float, height: float) -> None:
        self.size = size
        self.rgb = np.zeros((math.ceil(size * height), math.ceil(size * width), 3), np.uint8)
        self.mask = np.zeros(self.rgb.shape[:2], np.uint8)

    def polygon(self, color: Color, *points: Pair) -> None:
        corners = np.round(np.array(points) * self.size).astype(np.int32)
        cv2.fillPoly(self.rgb, [corners], tuple(map(float, color)))
        cv2.fillPoly(self.mask, [corners], (1,))

    def oval(self, color: Color, center: Pair, half_axes: Pair, angle: float = 0, bend: float = 1) -> None:
        """Fill an ellipse, turned by `angle` degrees; bend < 1 nears it to its rectangle."""
        turn, a = np.linspace(0, 2 * np.pi, 32, endpoint=False), np.deg2rad(angle)
        u, v = (
            r * np.sign(f) * np.abs(f) ** bend for r, f in zip(half_axes, (np.cos(turn), np.sin(turn)), strict=True)
        )
        x, y = center[0] + u * np.cos(a) - v * np.sin(a), center[1] + u * np.sin(a) + v * np.cos(a)
        self.polygon(color, *zip(x, y, strict=True))

    def box(self, color: Color, x0: float, y0: float, x1: float, y1: float, bend: float = 0) -> None:
        """Fill a rectangle; its corners are rounder with a larger bend (0 to 1)."""
        self.oval(color, ((x0 + x1) / 2, (y0 + y1) / 2), ((x1 - x0) / 2, (y1 - y0) / 2), bend=bend)

    def finish(self, rng: Generator) -> Patch:
        """Light it from above, darken its rim and add grain."""
        inner = cv2.erode(self.mask, np.ones((5, 5), np.uint8), borderValue=(0,))
        light = np.linspace(1.12, 0.82, len(inner))[:, None] * np.where(inner, 1.0, 0.68)
        rgb = self.rgb * light[..., None] + 5 * noise(rng, inner.shape, (len(inner) // 2, len(inner) // 2))
        return np.clip(rgb, 0, 255).astype(np.uint8), self.mask.astype(bool)


def noise(rng: Generator, shape: tuple[int, ...], cells: tuple[int, int]) -> Array:
    """Smooth noise of mean 0 and standard deviation about 1, float32 [H, W, 1], of `cells` cells (down, across)."""
    return cv2.resize(rng.standard_normal(cells, np.float32), shape[1::-1], interpolation=cv2.INTER_CUBIC)[..., None]


def pick(rng: Generator, *colors: Color) -> Array:
    """One of the colours, varied a little, float64 [3]."""
    return np.clip(colors[rng.integers(len(colors))] + rng.uniform(-14, 14, 3), 0, 255)


def draw_aeroplane(rng: Generator, size: int) -> Patch:
    s, y, r, reach = Sketch(size, 1, 0.56), 0.29, rng.uniform(0.07, 0.09), rng.uniform(0.21, 0.26)
    body = pick(rng, (238, 240, 245), (205, 212, 222), (240, 232, 215))
    accent = pick(rng, (30, 70, 170), (200, 40, 40), (20, 120, 110), (235, 140, 20))
    s.polygon(body * 0.66, (0.44, y), (0.56, y), (0.4, y - reach + 0.05), (0.34, y - reach + 0.05))  # the far wing
    s.polygon(accent, (0.04, y - 0.22), (0.13, y - 0.22), (0.25, y - 0.02), (0.08, y))
    s.polygon(body, (0.05, y - 0.03), (0.24, y - r), (0.24, y + r), (0.14, y + r * 0.6))
    s.oval(body, (0.58, y), (0.4, r), bend=0.6)
    s.polygon(accent, (0.1, y + 0.012), (0.96, y + 0.012), (0.93, y + 0.034), (0.13, y + 0.034))
    for x in np.arange(0.26, 0.95, 0.052):
        s.oval((45, 60, 90), (x, y - 0.022), (0.013, 0.016))
    s.box(accent * 0.8, 0.45, y + r, 0.6, y + r + 0.075, 0.4)  # an engine
    s.polygon(body * 0.78, (0.42, y + 0.02), (0.62, y + 0.02), (0.38, y + reach), (0.3, y + reach))
    return s.finish(rng)


def draw_boat(rng: Generator, size: int) -> Patch:
    s, x, y = Sketch(size, 0.9, 1), rng.uniform(0.4, 0.5), rng.uniform(0.74, 0.78)  # the mast's foot
    hull = pick(rng, (160, 45, 40), (35, 60, 120), (120, 72, 40), (40, 100, 90))
    sail, jib = pick(rng, (248, 244, 232), (240, 225, 190)), pick(rng, (245, 240, 230), (215, 80, 50), (240, 190, 60))
    s.polygon(sail, (x, 0.03), (x, y), (0.06, y - 0.06), (x * 0.55, 0.36))
    for part in (0.3, 0.55, 0.8):  # seams
        s.box(sail * 0.8, x * (1 - part * 0.75), part * (y - 0.1), x, part * (y - 0.1) + 0.014)
    s.polygon(jib, (x, 0.08), (x, y), (0.84, y - 0.05), (x + 0.22, 0.42))
    s.box((95, 70, 45), x - 0.014, 0.01, x + 0.014, y)
    s.polygon(hull, (0.01, y), (0.89, y - 0.03), (0.8, 0.94), (0.7, 0.99), (0.18, 0.99), (0.09, 0.94))
    s.polygon((240, 238, 230), (0.025, y + 0.035), (0.875, y + 0.01), (0.865, y + 0.04), (0.035, y + 0.065))
    for x in np.arange(0.24, 0.72, 0.15):
        s.oval((240, 235, 215), (x, 0.885), (0.028, 0.028))
    return s.finish(rng)


def draw_bottle(rng: Generator, size: int) -> Patch:
    half, neck, y = rng.uniform(0.16, 0.2), rng.uniform(0.055, 0.07), rng.uniform(0.36, 0.44)  # y: the shoulders
    s, x, cap = Sketch(size, 2 * half + 0.02, 1), half + 0.01, pick(rng, (200, 35, 40), (215, 180, 70), (235, 235, 240))
    glass = pick(rng, (35, 105, 50), (120, 65, 25), (30, 85, 95), (75, 110, 30))
    label = pick(rng, (245, 235, 205), (225, 60, 45), (250, 205, 70))
    s.box(glass * 0.95, x - neck, 0.03, x + neck, y)
    s.oval(glass, (x, y), (half, 0.15))
    s.box(glass, x - half, y, x + half, 0.99, 0.08)
    s.box(glass * 1.7, x - half * 0.74, y - 0.02, x - half * 0.5, 0.95, 0.2)  # a reflection
    s.box(label, x - half, y + 0.1, x + half, 0.86)
    for stripe in (y + 0.13, 0.81):
        s.box(label * 0.45, x - half, stripe, x + half, stripe + 0.025)
    s.oval(glass * 1.3, (x, (y + 0.98) / 2), (half * 0.5, 0.075))
    s.box(cap, x - neck - 0.012, 0.01, x + neck + 0.012, 0.085)
    return s.finish(rng)


def draw_bus(rng: Generator, size: int) -> Patch:
    tops, num = ((0.07,), (0.07, 0.31))[rng.integers(2)], int(rng.integers(4, 7))  # one or two decks of windows
    h, pitch = rng.uniform(0.46, 0.52) if len(tops) == 1 else 0.66, 0.66 / num
    s, paint = (
        Sketch(size, 1, h),
        pick(rng, (205, 35, 35), (245, 185, 25), (30, 95, 185), (40, 140, 80), (230, 105, 30)),
    )
    s.box(paint, 0.01, 0.01, 0.99, h - 0.075, 0.12)
    for y in tops:
        s.box((28, 38, 55), 0.04, y - 0.012, 0.055 + num * pitch, y + 0.142)
        for x in 0.055 + pitch * np.arange(num):
            s.box((120, 165, 195), x, y, x + pitch - 0.025, y + 0.13)
            s.polygon((185, 215, 230), (x, y), (x + pitch * 0.45, y), (x, y + 0.1))
    s.box((105, 150, 185), 0.89, 0.07, 0.985, h - 0.25)  # the windscreen
    for x in (0.74, 0.8):
        s.box((130, 175, 200), x, h - 0.38, x + 0.05, h - 0.1)  # the door
    s.box((245, 242, 232), 0.01, h - 0.205, 0.715, h - 0.165)
    for x in (0.2, 0.63):
        s.oval((25, 25, 28), (x, h - 0.083), (0.08, 0.08))
        s.oval((165, 168, 172), (x, h - 0.083), (0.036, 0.036))
    return s.finish(rng)


def draw_pottedplant(rng: Generator, size: int) -> Patch:
    s, rim, slim, tall = Sketch(size, 0.86, 1), rng.uniform(0.6, 0.66), rng.uniform(0.05, 0.08), rng.uniform(0.4, 0.52)
    pot = pick(rng, (190, 95, 55), (170, 80, 60), (205, 200, 190), (90, 110, 150))
    leaf, blossom = pick(rng, (50, 130, 45), (85, 150, 50), (30, 105, 60)), pick(rng, (235, 70, 110), (250, 200, 60))
    for angle in rng.permutation(np.linspace(-172, -8, int(rng.integers(17, 24)))):
        long, shade, a = tall * rng.uniform(0.55, 1), rng.uniform(0.65, 1.3), np.deg2rad(angle)
        x, y = 0.43 + long * 0.52 * np.cos(a), rim + 0.01 + long * 0.58 * np.sin(a)
        s.oval(leaf * shade, (x, y), (long * 0.5, slim), angle)
        s.oval(leaf * shade * 1.35, (x, y), (long * 0.42, 0.008), angle)  # the midrib
    for x, y in rng.uniform((0.26, 0.24), (0.6, 0.46), (5 * rng.integers(2), 2)):
        s.oval(blossom, (x, y), (0.04, 0.04))
    s.polygon(pot, (0.2, rim + 0.05), (0.66, rim + 0.05), (0.59, 0.99), (0.27, 0.99))
    s.polygon(pot * 1.25, (0.26, rim + 0.08), (0.33, rim + 0.08), (0.35, 0.97), (0.31, 0.97))
    s.box(pot * 1.12, 0.17, rim - 0.02, 0.69, rim + 0.075, 0.1)
    return s.finish(rng)


def draw_sheep(rng: Generator, size: int) -> Patch:
    s, rx, wool = Sketch(size, 1, 0.78), rng.uniform(0.29, 0.33), pick(rng, (238, 232, 215), (225, 218, 200))
    face = pick(rng, (45, 40, 40), (75, 60, 52), (205, 180, 155))
    for x in (0.26, 0.36, 0.58, 0.67):
        s.box(face * 0.9, x - 0.03, 0.5, x + 0.03, 0.77)
    s.oval(wool * 0.74, (0.46, 0.36), (rx, 0.2))
    for turn, far in rng.random((90, 2)):  # curls of wool
        x, y = 0.46 + rx * far**0.4 * np.cos(2 * np.pi * turn), 0.36 + 0.2 * far**0.4 * np.sin(2 * np.pi * turn)
        s.oval(wool * 0.74, (x, y), (0.06, 0.06))
        s.oval(wool * rng.uniform(0.92, 1.08), (x - 0.006, y - 0.012), (0.051, 0.049))
    for x, y, angle in ((0.74, 0.24, 20), (0.93, 0.22, -25)):
        s.oval(face * 0.8, (x, y), (0.07, 0.03), angle)  # an ear
    s.oval(face, (0.84, 0.32), (0.085, 0.15), -22)
    for x, y in ((0.77, 0.19), (0.83, 0.16), (0.88, 0.19)):
        s.oval(wool, (x, y), (0.055, 0.045))
    for x in (0.815, 0.885):
        s.oval((250, 250, 245), (x, 0.285), (0.02, 0.022))
        s.oval((15, 15, 15), (x + 0.004, 0.288), (0.01, 0.012))
    return s.finish(rng)


def draw_tvmonitor(rng: Generator, size: int) -> Patch:
    h, edge, kind = rng.uniform(0.6, 0.72), rng.uniform(0.045, 0.065), rng.integers(3)
    s, low, case = Sketch(size, 1, h + 0.16), h - 0.075, pick(rng, (30, 30, 34), (60, 60, 66), (205, 202, 192))
    glow = pick(rng, (45, 130, 215), (60, 175, 200), (110, 95, 200))
    s.polygon(case * 0.8, (0.44, h - 0.02), (0.56, h - 0.02), (0.6, h + 0.12), (0.4, h + 0.12))
    s.box(case * 0.95, 0.26, h + 0.09, 0.74, h + 0.15, 0.2)
    s.box(case, 0.01, 0.01, 0.99, h, 0.06)
    for row in range(8):
        s.box(glow * (0.75 + 0.1 * row), edge, edge + (low - edge) * row / 8, 1 - edge, low)
    if kind == 0:  # on the screen: hills, or lines of text, or colour bars
        s.polygon((35, 110, 75), (edge, low), (0.3, low * 0.5), (0.52, low * 0.8), (0.7, low * 0.6), (1 - edge, low))
    for y in np.arange(edge + 0.07, low - 0.05, 0.075) if kind == 1 else ():
        s.box((235, 245, 255), 0.13, y, rng.uniform(0.45, 0.87), y + 0.028)
    for bar in range(7 if kind == 2 else 0):
        s.box(220 * (np.array((2, 4, 1)) & 7 - bar > 0), edge + (1 - 2 * edge) * bar / 7, edge, 1 - edge, low)
    s.polygon(glow * 1.7, (edge, edge), (0.3, edge), (edge, edge + 0.22))  # a reflection
    return s.finish(rng)


CLASSES: dict[str, tuple[Callable[[Generator, int], Patch], float]] = {
    "aeroplane": (draw_aeroplane, 1.4),
    "boat": (draw_boat, 1.05),
    "bottle": (draw_bottle, 1.2),
    "bus": (draw_bus, 1.2),
    "pottedplant": (draw_pottedplant, 1.05),
    "sheep": (draw_sheep, 1.15),
    "tvmonitor": (draw_tvmonitor, 0.95),
}
"""What draws a class, and how large it is beside the others."""
