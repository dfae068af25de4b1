"""How much arithmetic the network takes, from its layers' shapes alone."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from dist_deeplab.model.deeplabv2 import MultiScale, scaled_length


def training_flops(model: MultiScale, size: tuple[int, int]) -> int:
    """Return the floating-point operations of one image's forward and backward, at all of the model's scales.

    A multiply-add counts as two. Counted are convolutions and the head's matrix products, on tensors without data:
    nothing is computed and `model` is left alone. 0.45 TFLOP for ResNet-101 on a crop of 321.

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
