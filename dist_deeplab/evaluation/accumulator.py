"""What one rank counts of an evaluation: pixels by label and prediction, near borders and in all, image by image."""

import logging
import time
from dataclasses import dataclass

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.evaluation.boundaries import NUM_BANDS, band_map
from dist_deeplab.evaluation.confusion import count_pixels, image_mious

_REPORT_EVERY_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageScore:
    """An image's mean IoU over the classes in its label or prediction; NaN where all of it is void."""

    key: str
    miou: float


class Tally:
    """What a rank has counted so far, on its device: the host reads nothing back before the end."""

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
        label = batch.label[:, : pred.shape[1], : pred.shape[2]]
        bands = _band_maps(label, batch.content, self._ignore_label)
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
        """Return the score of each image, in the order they came."""
        mious = torch.cat(self._mious).tolist() if self._mious else []
        return [ImageScore(key, miou) for key, miou in zip(self._keys, mious, strict=True)]

    def report_now_and_then(self, *, out_of: int) -> None:
        """Log how far this rank is, twice a minute."""
        if time.monotonic() > self._report_at:
            log.info("evaluated %d of this rank's %d images", len(self._keys), out_of)
            self._report_at = time.monotonic() + _REPORT_EVERY_S


def _band_maps(label: torch.Tensor, content: torch.Tensor, ignore_label: int) -> torch.Tensor:
    """Return uint8 [B, H, W]: how near to a border pixels are. Padding is no border: it is not looked at."""
    bands = torch.zeros_like(label)
    for own, one, (height, width) in zip(bands, label, content.tolist(), strict=True):
        own[:height, :width] = torch.from_numpy(band_map(one[:height, :width].numpy(), ignore_label))
    return bands
