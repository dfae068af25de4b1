"""Photometric distortion of training images: random brightness, contrast, saturation and hue.

What SSD does to its training images (Liu et al. 2016, arXiv:1512.02325, `distort_param` of its Caffe layer), with the
magnitudes of mmsegmentation's `PhotoMetricDistortion`: each of the four with probability 1/2; contrast before or after
saturation and hue, with probability 1/2 each. All on uint8, as tables of 256 values, every result rounded and cut to
0..255.
"""

import numpy as np

NUM_DRAWS = 9
"""Uniforms that an image takes: whether and how much for each of the four, and when contrast comes."""
_BRIGHTNESS = 32.0  # largest change, of 0..255
_CONTRAST = _SATURATION = (0.5, 1.5)  # range of the factor
_HUE = 18  # largest change, of OpenCV's 0..179 for uint8: 36 degrees
_VALUES = np.arange(256, dtype=np.float64)


def distort(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The image in other colours, uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3] RGB.
        draws: float64 [9] in [0, 1): for brightness, contrast, saturation and hue each, whether (below 1/2) and how
            much; and whether contrast comes before saturation and hue (below 1/2).
    """
    import cv2

    chosen, amounts = draws[0:8:2] < 0.5, draws[1:8:2]
    brightness, contrast, saturation, hue = (
        amount if is_chosen else None for is_chosen, amount in zip(chosen, amounts, strict=True)
    )
    early, late = (contrast, None) if draws[8] < 0.5 else (None, contrast)
    before = _VALUES if brightness is None else _rounded(_VALUES + _BRIGHTNESS * (2 * brightness - 1))
    before = before if early is None else _rounded(before * _between(_CONTRAST, early))
    if before is not _VALUES:
        image = cv2.LUT(image, before.astype(np.uint8))
    if saturation is not None or hue is not None:
        image = _in_other_hues(image, saturation, hue)
    if late is not None:
        image = cv2.LUT(image, _rounded(_VALUES * _between(_CONTRAST, late)).astype(np.uint8))
    return image


def _in_other_hues(image: np.ndarray, saturation: float | None, hue: float | None) -> np.ndarray:
    import cv2

    table = np.stack([_VALUES] * 3, axis=-1)
    if hue is not None:
        # Whole steps -18 .. 18, all alike; OpenCV counts hue in steps of 2 degrees.
        table[:, 0] = (_VALUES + int(hue * (2 * _HUE + 1)) - _HUE) % 180
    if saturation is not None:
        table[:, 1] = _rounded(_VALUES * _between(_SATURATION, saturation))
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table.astype(np.uint8)[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255)
