"""Cross-entropy as a sum and a count of valid pixels, never a mean of means.

The loss of an optimizer step is the sum over all valid pixels of all ranks and micro-batches, divided once by their
global number: so any split of a batch has the same gradient.
"""

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


def cross_entropy_sum(logits: torch.Tensor, label: torch.Tensor, ignore_label: int) -> torch.Tensor:
    """The sum of the cross-entropy over valid pixels, float32 []; 0 where all are void.

    Args:
        logits: float [B, C, h, w]; lower precisions are widened to float32 first.
        label: int64 [B, h, w], class indices or `ignore_label`.
        ignore_label: the void label.
    """
    # A mask instead of F.cross_entropy, whose CUDA kernels add up in any order; at this size both take no time.
    classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1)
    others = (label.unsqueeze(1) != classes) | (label == ignore_label).unsqueeze(1)
    return -F.log_softmax(logits.float(), dim=1).masked_fill(others, 0.0).sum()
