"""The confusion matrix and the scores that follow from it."""

import math
from dataclasses import dataclass

import numpy as np
import torch


def confusion_matrix(label: torch.Tensor, pred: torch.Tensor, *, num_classes: int, ignore_label: int) -> torch.Tensor:
    """Return how many pixels of each class got each prediction, int64 [num_classes (label), num_classes (pred)].

    label, pred: integer tensors of one shape, predictions in 0..num_classes-1; void pixels are left out.
    """
    valid = label != ignore_label
    joint = label[valid].long() * num_classes + pred[valid].long()
    return torch.bincount(joint, minlength=num_classes**2).view(num_classes, num_classes)


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
    num_absent: int
    """Classes without ground truth, left out of both means."""


def scores(confusion: np.ndarray) -> Scores:
    """Return the scores of an int64 [num_classes, num_classes] matrix (rows: label, columns: prediction).

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
        num_absent=int((~present).sum()),
    )


def image_miou(confusion: np.ndarray) -> float:
    """Return the mean IoU of one image's matrix over the classes in its label or its prediction, NaN if all is void."""
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return float((np.diag(confusion)[union > 0] / union[union > 0]).mean()) if union.any() else math.nan
