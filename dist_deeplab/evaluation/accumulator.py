"""What one rank counts of an evaluation: pixels by label and prediction, near borders and in all, image by image.

Trimaps say how good a prediction is near the borders of objects, where a dense CRF is meant to help. DeepLab-v2
(arXiv:1606.00915, figure 10) plots the mean IoU of the pixels within a band of w pixels around borders, over w. A pixel
is on a border here if it touches (up, down, left, right) another class or void; it has distance 1, and distances are
Chebyshev distances (a diagonal step counts as one). Void is never scored, whatever its distance.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.evaluation.confusion import count_pixels, image_mious
from dist_deeplab.logs import format_count

TRIMAP_WIDTHS = (1, 2, 3, 5, 10, 20, 40)
"""Half-widths of the bands in pixels; the paper's figure goes to 40."""
NUM_BANDS = len(TRIMAP_WIDTHS) + 1

_BAND_OF_DISTANCE = np.searchsorted(TRIMAP_WIDTHS, np.arange(256)).astype(np.uint8)
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=np.uint8)
_REPORT_EVERY_S = 30.0

log = logging.getLogger(__name__)


def band_map(label: np.ndarray, ignore_label: int) -> np.ndarray:
    """Border band of each pixel of a label, uint8 [H, W] -> uint8 [H, W] in 0..NUM_BANDS-1; 7 ms for a VOC image.

    Band i has the distances up to TRIMAP_WIDTHS[i] and above the width before; the last one all larger distances.
    Only the label decides, never a prediction: predictions of different networks are scored on the same pixels.
    """
    import cv2

    on_border = (cv2.dilate(label, _CROSS) != cv2.erode(label, _CROSS)) | (label == ignore_label)
    distance = cv2.distanceTransform((~on_border).view(np.uint8), cv2.DIST_C, 3)  # far above 255 without any border
    return cv2.LUT(np.minimum(distance + 1, 255).astype(np.uint8), _BAND_OF_DISTANCE)


@dataclass(frozen=True)
class ImageScore:
    """An image's mean IoU over the classes in its label or prediction; NaN where all of it is void."""

    key: str
    miou: float


class ConfusionAccumulator:
    """Counts of one rank so far, on its device: the host reads nothing back before the end."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        classes = manifest.num_classes
        self.counts = torch.zeros(NUM_BANDS, classes, classes, dtype=torch.int64, device=device)
        """int64 [bands, classes, classes]: rows label, columns prediction."""
        self._ignore_label, self._device = manifest.ignore_label, device
        self._keys: list[str] = []
        self._mious: list[torch.Tensor] = []
        self._report_at = time.monotonic() + _REPORT_EVERY_S

    def add(self, batch: Batch, pred: torch.Tensor) -> None:
        """Count a batch and its prediction, uint8 [B, H, W] on the device; H and W without the grid's padding."""
        assert batch.bands is not None, "the loader computes them"
        label, bands = (mask[:, : pred.shape[1], : pred.shape[2]] for mask in (batch.label, batch.bands))
        own = count_pixels(
            label.to(self._device, non_blocking=True),
            pred,
            num_classes=self.counts.shape[-1],
            ignore_label=self._ignore_label,
            band=bands.to(self._device, non_blocking=True),
            num_bands=NUM_BANDS,
        )
        self.counts += own.sum(0)
        self._mious.append(image_mious(own.sum(1)))
        self._keys += batch.keys

    def scores(self) -> list[ImageScore]:
        """Score of each image, in the order of `add`."""
        mious = torch.cat(self._mious).tolist() if self._mious else []
        return [ImageScore(key, miou) for key, miou in zip(self._keys, mious, strict=True)]

    def report_progress(self, *, out_of: int) -> None:
        """Log how far this rank is, twice a minute at most."""
        if time.monotonic() > self._report_at:
            log.info("evaluated %d of this rank's %s", len(self._keys), format_count(out_of, "image"))
            self._report_at = time.monotonic() + _REPORT_EVERY_S
