"""Images too large to be taken whole: overlapping windows, blended where they overlap, strip by strip."""

from collections.abc import Callable, Iterator

import numpy as np

from dist_deeplab.data.windows import Windows


def sliding_probabilities(
    predict: Callable[[np.ndarray], np.ndarray], image: np.ndarray, windows: Windows
) -> Iterator[np.ndarray]:
    """Yield the probabilities of an image from top to bottom, in strips float32 [C, h, W] that add up to [C, H, W].

    A window's weight falls towards its borders over `overlap` pixels, so no seam is seen; the weighted mean is of
    probabilities. Memory: one row of windows, whatever the image's height.

    Args:
        predict: uint8 [h, w, 3] -> probabilities float32 [C, h, w].
        image: uint8 [H, W, 3].
        windows: their size, smaller where the image is, and overlap.
    """
    height, width = image.shape[:2]
    rows, columns = windows.starts(height), windows.starts(width)
    tall, wide = min(windows.side, height), min(windows.side, width)
    weight = np.minimum.outer(_ramp(tall, windows.overlap), _ramp(wide, windows.overlap)).astype(np.float32)
    total: np.ndarray | None = None
    weights = np.zeros((tall, width), dtype=np.float32)
    for number, top in enumerate(rows):
        for left in columns:
            prob = predict(image[top : top + tall, left : left + wide])
            if total is None:
                total = np.zeros((len(prob), tall, width), dtype=np.float32)
            total[:, :, left : left + wide] += weight * prob
            weights[:, left : left + wide] += weight
        assert total is not None
        done = (rows[number + 1] if number + 1 < len(rows) else height) - top
        yield total[:, :done] / weights[:done]
        total = np.concatenate([total[:, done:], np.zeros_like(total[:, :done])], axis=1)
        weights = np.concatenate([weights[done:], np.zeros_like(weights[:done])])


def _ramp(length: int, overlap: int) -> np.ndarray:
    """Weights that rise from both ends to 1 over `overlap` pixels, never 0."""
    position = np.arange(length)
    return np.minimum(1, (1 + np.minimum(position, length - 1 - position)) / (overlap + 1))
