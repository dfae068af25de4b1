"""Cross-entropy as a sum over pixels and what it is divided by, never a mean of means.

The loss of an optimizer step is the sum over all valid pixels of all ranks and micro-batches, divided once by their
global number (weight, where pixels have weights): so any split of a batch has the same gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


def sample_label(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The label at the pixels that a grid of logits sits on: int64 [B, h, w] of integer [B, H, W].

    Corners are aligned: logit (i, j) lies on pixel (i (H-1)/(h-1), j (W-1)/(w-1)), rounded half up; for H of 8k+1 at
    full scale that is exactly label[::8, ::8]. Resizing routines drift by up to 7 pixels here.
    """
    rows, columns = (_grid(length, points) for length, points in zip(label.shape[1:], size, strict=True))
    return label[:, rows][:, :, columns].long()


def _grid(length: int, points: int) -> torch.Tensor:
    if points == 1:
        return torch.zeros(1, dtype=torch.int64)
    # Integer arithmetic: floor(i (n-1)/(m-1) + 1/2), the same on every machine.
    return (2 * torch.arange(points) * (length - 1) + (points - 1)) // (2 * (points - 1))


def num_valid(label: torch.Tensor, ignore_label: int) -> int:
    """Number of pixels of a CPU label tensor that are not void."""
    return int((label != ignore_label).sum())


def cross_entropy_sum(
    logits: torch.Tensor, label: torch.Tensor, ignore_label: int, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of the cross-entropy over valid pixels, float32 []; 0 where all are void.

    Args:
        logits: float [B, C, h, w]; lower precisions are widened to float32 first.
        label: int64 [B, h, w], class indices or `ignore_label`.
        ignore_label: the void label.
        weight: float32 [B, h, w], what each pixel's cross-entropy is multiplied by; None: 1.
    """
    # A mask instead of F.cross_entropy, whose CUDA kernels add up in any order; at this size both take no time.
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1)
    others = (label.unsqueeze(1) != classes) | (label == ignore_label).unsqueeze(1)
    pixels = -F.log_softmax(logits.float(), dim=1).masked_fill(others, 0.0)
    return (pixels if weight is None else pixels * weight.unsqueeze(1)).sum()


@dataclass(frozen=True)
class CrossEntropy:
    """How the cross-entropy of a step's pixels is averaged.

    The loss is sum(w ce) / N over the whole step. pixels: w is the weight of the pixel's class, N the sum of w (as
    torch's `CrossEntropyLoss(weight)`). images: the mean of the images' own means, so w is divided by the sum of its
    image's, and N is the number of images; one that is all void adds 0, as in Caffe's solver with batches of 1.

    ignore_label: the void label. class_weights: one per class; empty: 1 each.
    """

    ignore_label: int
    class_weights: tuple[float, ...] = ()
    average: Literal["pixels", "images"] = "pixels"

    @property
    def is_weighted(self) -> bool:
        """Whether pixels count differently, so that `weigh` is needed."""
        return bool(self.class_weights) or self.average == "images"

    def weigh(self, label: torch.Tensor) -> torch.Tensor:
        """Weight of each pixel, float32 [B, h, w] of a CPU label int64 [B, h, w]; 0 where void."""
        by_label = torch.ones(256, dtype=torch.float64)
        by_label[: len(self.class_weights)] = torch.tensor(self.class_weights, dtype=torch.float64)
        by_label[self.ignore_label] = 0.0
        weight = by_label[label]
        if self.average == "images":
            total = weight.sum((1, 2), keepdim=True)
            weight = weight / total.masked_fill(total == 0, 1.0)
        return weight.float()

    def divisor(self, labels: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> float:
        """What these images add to the number N that the step's sum is divided by."""
        if self.average == "images":
            return float(sum(len(label) for label in labels))
        if self.class_weights:
            return float(sum(weight.sum(dtype=torch.float64) for weight in weights))
        return float(sum(num_valid(label, self.ignore_label) for label in labels))


def balanced_weights(class_pixels: Sequence[int]) -> tuple[float, ...]:
    """Class weights in inverse proportion to pixels: sum(n) / (C n_c), C the number of classes that have pixels.

    scikit-learn's "balanced" (`compute_class_weight`; King and Zeng 2001), so that the mean weight of a pixel is 1 and
    all classes weigh alike in sum. To 6 digits; a class without pixels gets 1, which no pixel uses.
    """
    there = sum(count > 0 for count in class_pixels)
    return tuple(float(f"{sum(class_pixels) / (there * count):.6g}") if count else 1.0 for count in class_pixels)
