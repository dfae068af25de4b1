"""Joint augmentation of image and label: random scale, horizontal flip and crop, by resizing just what the crop shows.

Along each axis a part of n whole source pixels becomes m target pixels, with cv2.resize's geometry: target pixel i
shows position (i + 1/2) n / m - 1/2 of the part. Where the scaled sample fits into the crop, the part is all of it;
else round(crop / scale) pixels of it fill the crop. Rounding n moves the scale by half a source pixel over the crop at
most, and makes this a third of the time of a warp that may start between pixels.
"""

from dataclasses import dataclass

import numpy as np

from dist_deeplab.data import photometric

_GEOMETRIC_DRAWS = 4


@dataclass(frozen=True)
class Augmentation:
    """What training does to every sample. Draws 4 uniforms: scale, vertical and horizontal offset, flip.

    scale_step: scales are low, low + step, ... high; 0: any between. photometric: brightness, contrast, saturation and
    hue too, which draws 9 more.
    """

    crop_size: int
    scale_range: tuple[float, float]
    flip: bool
    ignore_label: int
    scale_step: float = 0.0
    photometric: bool = False

    @property
    def num_draws(self) -> int:
        """Uniforms that a sample takes."""
        return _GEOMETRIC_DRAWS + (photometric.NUM_DRAWS if self.photometric else 0)

    def __call__(
        self, image: np.ndarray, label: np.ndarray, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """A crop of the scaled, perhaps flipped sample.

        Args:
            image: uint8 [H, W, 3] RGB.
            label: uint8 [H, W].
            draws: float64 [num_draws] in [0, 1).

        Returns:
            image uint8 [crop, crop, 3], bilinear; label uint8 [crop, crop], nearest; and the height and width of
            the part that shows the sample. Where the scaled sample is smaller than the crop it lies at the top left,
            the rest is 0 in the image (see `Preprocessing.normalize`, which makes it the mean) and void in the label.
        """
        import cv2

        scale = self.scale_of(draws[0])
        rows, columns = (self._window(n, scale, draw) for n, draw in zip(label.shape, draws[1:3], strict=True))
        size = (columns.target, rows.target)
        image = cv2.resize(image[rows.source, columns.source], size, interpolation=cv2.INTER_LINEAR)
        label = label[rows.nearest()][:, columns.nearest()]
        if self.flip and draws[3] < 0.5:
            image, label = cv2.flip(image, 1), cv2.flip(label, 1)
        if self.photometric:
            image = photometric.distort(image, draws[_GEOMETRIC_DRAWS:])
        side = (self.crop_size, self.crop_size)
        return pad_to(image, side, 0), pad_to(label, side, self.ignore_label), (rows.target, columns.target)

    def scale_of(self, draw: float) -> float:
        """The random scale of a draw in [0, 1)."""
        low, high = self.scale_range
        if not self.scale_step:
            return low + (high - low) * draw
        return low + int(draw * (round((high - low) / self.scale_step) + 1)) * self.scale_step

    def _window(self, length: int, scale: float, draw: float) -> "_Window":
        """The part of an axis of `length` pixels that a crop shows: all of it, or what fills the crop."""
        scaled = max(1, round(length * scale))
        if scaled <= self.crop_size:
            return _Window(slice(0, length), scaled)
        shown = min(length, max(1, round(self.crop_size / scale)))
        start = int(draw * (length - shown + 1))
        return _Window(slice(start, start + shown), self.crop_size)


@dataclass(frozen=True)
class _Window:
    """Along one axis: the source pixels shown, and how many target pixels they become."""

    source: slice
    target: int

    def nearest(self) -> np.ndarray:
        """The source pixel that the middle of each target pixel lies on, int64 [target]."""
        shown = self.source.stop - self.source.start
        return self.source.start + (2 * np.arange(self.target) + 1) * shown // (2 * self.target)


def pad_to(array: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    """`array` [H, W, ...] with `value` added below and to the right up to `size` (height, width)."""
    if array.shape[:2] == size:
        return array
    padded = np.full((*size, *array.shape[2:]), value, dtype=array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def next_grid_size(length: int) -> int:
    """The smallest 8k+1 that is not under `length`: what evaluation pads an image to."""
    return (length + 6) // 8 * 8 + 1
