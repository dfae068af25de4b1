"""Confusion matrices and the scores that follow from them."""

from dataclasses import dataclass

import numpy as np
import torch


def count_pixels(
    label: torch.Tensor,
    pred: torch.Tensor,
    *,
    num_classes: int,
    ignore_label: int,
    band: torch.Tensor | None = None,
    num_bands: int = 1,
) -> torch.Tensor:
    """Number of pixels of each class with each prediction: int64 [B, num_bands, num_classes, num_classes].

    The last two axes are label and prediction. Void pixels are left out. The host never waits for the device here.

    Args:
        label: uint8 [B, H, W], in 0..num_classes-1 or the void label.
        pred: uint8 [B, H, W], in 0..num_classes-1.
        num_classes: classes.
        ignore_label: the void label.
        band: uint8 [B, H, W] in 0..num_bands-1, which of several matrices counts a pixel; None: there is one.
        num_bands: matrices for each image.
    """
    joint = label.long() * num_classes + pred
    if band is not None:
        joint += band.long() * num_classes**2
    size = num_bands * num_classes**2
    joint += size * torch.arange(len(label), device=label.device).view(-1, 1, 1)
    void = len(label) * size  # a bin behind all others
    joint = torch.where(label == ignore_label, void, joint).flatten()
    # Not bincount: it asks the device for the largest index, and is 40 times slower on a CPU (torch 2.13).
    counts = torch.zeros(void + 1, dtype=torch.int64, device=label.device)
    counts.scatter_add_(0, joint, joint.new_ones(()).expand(joint.numel()))
    return counts[:void].view(len(label), num_bands, num_classes, num_classes)


def image_mious(counts: torch.Tensor) -> torch.Tensor:
    """Mean IoU of each image from its matrix [B, C, C], float64 [B]; NaN where all is void.

    The mean is over the classes in the image's label or prediction. The host does not wait for the device.
    """
    hits = counts.diagonal(dim1=1, dim2=2).double()
    union = counts.sum(1) + counts.sum(2) - hits
    ious = hits / union  # NaN for a class that is in neither
    return ious.nansum(1) / (union > 0).sum(1)


@dataclass(frozen=True)
class Scores:
    """Scores of a confusion matrix, all in 0..1; NaN for a class without ground truth."""

    iou: np.ndarray
    """float64 [num_classes]: TP / (TP + FP + FN)."""
    miou: float
    """Mean of `iou` over the classes that have ground truth (VOC's measure when all have)."""
    pixel_accuracy: float
    mean_accuracy: float
    """Mean over the same classes of the share of their pixels that were found."""
    fwiou: float
    """Mean of `iou` weighted by the classes' shares of the ground truth's pixels."""
    num_absent: int
    """Classes without ground truth, left out of the means."""


def scores(confusion: np.ndarray) -> Scores:
    """Scores of an int64 [num_classes, num_classes] matrix (rows: label, columns: prediction).

    Raises:
        ValueError: not a single valid pixel.
    """
    true_positive = np.diag(confusion).astype(np.float64)
    in_label, in_pred = confusion.sum(1), confusion.sum(0)
    total = in_label.sum()
    if total == 0:
        raise ValueError("the confusion matrix is empty: all pixels are void")
    present = in_label > 0
    union = np.where(present, in_label + in_pred - np.diag(confusion), 1)
    iou = np.where(present, true_positive / union, np.nan)
    accuracy = true_positive[present] / in_label[present]
    return Scores(
        iou=iou,
        miou=float(iou[present].mean()),
        pixel_accuracy=float(true_positive.sum() / total),
        mean_accuracy=float(accuracy.mean()),
        fwiou=float((iou[present] * in_label[present]).sum() / total),
        num_absent=int((~present).sum()),
    )
