"""Floating-point operations: those that the network takes, and those that a GPU does per second at most (for MFU)."""

import copy
import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_deeplab.model.deeplabv2 import MultiScale, scaled_length

_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    r"H200|H100 80GB HBM3": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4},
    r"H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0},
    r"A100\b": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0},
    r"L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0},
    r"\bL4\b": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    r"\bA40\b": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7},
    r"\bA10\b": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0},
    r"V100-SXM": {"fp32": 15.7, "fp16": 125.0},
    r"\bT4\b": {"fp32": 8.1, "fp16": 65.0},
    r"RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    r"RTX 3090\b": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0},
}
"""Name as CUDA gives it -> dense (without sparsity) TFLOP/s, NVIDIA's data sheets of each."""


def training_flops(model: MultiScale, size: tuple[int, int]) -> int:
    """Floating-point operations of one image's forward and backward, at all of the model's scales.

    A multiply-add counts as two. Counted are convolutions and the head's matrix products, on tensors without data:
    nothing is computed and `model` stays as it is. 0.45 TFLOP for ResNet-101 on a crop of 321.

    Args:
        model: the network as it is trained.
        size: rows and columns of the input image.
    """
    shadow = copy.deepcopy(model.net).to("meta").eval()  # statistics cost no convolution, and need no other ranks
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        for scale in model.scales:
            rows, columns = (scaled_length(length, scale) for length in size)
            shadow(torch.empty(1, 3, rows, columns, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a GPU in a `precision.dtype` (fp32, tf32, bf16, fp16); None if unknown."""
    for pattern, rates in _PEAK_TFLOPS.items():
        if re.search(pattern, device_name) and dtype in rates:
            return rates[dtype] * 1e12
    return None
