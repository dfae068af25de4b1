"""Joint augmentation of image and label: random scale, mirror and crop in a single warp.

Geometry is corner-aligned throughout (an image of n pixels scaled by s has (n-1)s+1), as in the network.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """What training does to every sample. Draws 4 uniforms: scale, vertical and horizontal offset, mirror."""

    crop_size: int
    scale_range: tuple[float, float]
    mirror: bool
    ignore_label: int

    num_draws = 4

    def __call__(
        self, image: np.ndarray, label: np.ndarray, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Return a crop of the scaled, perhaps mirrored sample.

        Args:
            image: uint8 [H, W, 3] RGB.
            label: uint8 [H, W].
            draws: float64 [4] in [0, 1).

        Returns:
            image uint8 [crop, crop, 3], bilinear; label uint8 [crop, crop], nearest; and the height and width of
            the part that shows the sample. Where the scaled sample is smaller than the crop it lies at the top left,
            the rest is 0 in the image (see `Preprocessing.normalize`, which makes it the mean) and void in the label.
        """
        low, high = self.scale_range
        scale = low + (high - low) * draws[0]
        mirrored = self.mirror and draws[3] < 0.5
        (y_step, y_start, height), (x_step, x_start, width) = (
            self._axis(length, scale, draw) for length, draw in zip(label.shape, draws[1:3], strict=True)
        )
        if mirrored:
            x_step, x_start = -x_step, label.shape[1] - 1 - x_start
        source_of_target = np.array([[x_step, 0.0, x_start], [0.0, y_step, y_start]])
        size = (width, height)
        nearest = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
        linear = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        replicate = cv2.BORDER_REPLICATE  # the target lies inside the source, up to rounding at the very border
        image = cv2.warpAffine(image, source_of_target, size, flags=linear, borderMode=replicate)
        label = cv2.warpAffine(label, source_of_target, size, flags=nearest, borderMode=replicate)
        side = (self.crop_size, self.crop_size)
        return pad_to(image, side, 0), pad_to(label, side, self.ignore_label), (height, width)

    def _axis(self, length: int, scale: float, draw: float) -> tuple[float, float, int]:
        """Return, along one axis, source pixels per target pixel, source position of target 0, and target length."""
        scaled = max(2, round((length - 1) * scale) + 1)
        step = (length - 1) / (scaled - 1)
        offset = int(draw * (max(0, scaled - self.crop_size) + 1))
        return step, offset * step, min(scaled, self.crop_size)


def pad_to(array: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """Return `array` [H, W, ...] with `value` added below and to the right up to `size` (height, width)."""
    if array.shape[:2] == size:
        return array
    padded = np.full((*size, *array.shape[2:]), value, dtype=array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def next_grid_size(length: int) -> int:
    """Return the smallest 8k+1 that is not under `length`: what evaluation pads an image to."""
    return (length + 6) // 8 * 8 + 1
