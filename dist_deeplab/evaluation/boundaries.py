"""Trimaps: how good a prediction is near the borders of objects, where a dense CRF is meant to help.

DeepLab-v2 (arXiv:1606.00915, figure 10) plots the mean IoU of the pixels within a band of w pixels around borders,
over w. A pixel is on a border here if it touches (up, down, left, right) another class or void; it has distance 1, and
distances are in king's moves. Void is never scored, whatever its distance.
"""

import numpy as np

TRIMAP_WIDTHS = (1, 2, 3, 5, 10, 20, 40)
"""Half-widths of the bands in pixels; the paper's figure goes to 40."""
NUM_BANDS = len(TRIMAP_WIDTHS) + 1

_BAND_OF_DISTANCE = np.searchsorted(TRIMAP_WIDTHS, np.arange(256)).astype(np.uint8)
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=np.uint8)


def band_map(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Return for each pixel of a label, uint8 [H, W], the first band that holds it: uint8 [H, W].

    Band i has the distances up to TRIMAP_WIDTHS[i] and above the width before; the last one all that are farther.
    """
    import cv2

    on_border = (cv2.dilate(label, _CROSS) != cv2.erode(label, _CROSS)) | (label == ignore_label)
    distance = cv2.distanceTransform((~on_border).view(np.uint8), cv2.DIST_C, 3)  # far above 255 where nothing is
    return cv2.LUT(np.minimum(distance + 1, 255).astype(np.uint8), _BAND_OF_DISTANCE)
