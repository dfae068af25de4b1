"""A network with its preprocessing and geometry inside: pixels in, logits of the same size out, for export."""

import torch
import torch.nn.functional as F
from torch import nn

from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import Preprocessing

STRIDE = 8


class Exportable(nn.Module):
    """float32 RGB values of 0..255 [B, 3, H, W], any H and W, to logits float32 [B, C, H, W], as evaluation makes them.

    Contains what evaluation does to an image at one scale: channel order, mean and standard deviation, padding with the
    mean to 8k+1, the network, corner-aligned resizing, cropping.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: DeepLabV2, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net = net
        self.is_bgr = preprocessing.channels == "bgr"
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """See the class."""
        height, width = image.shape[2], image.shape[3]
        x = image.flip(1) if self.is_bgr else image
        x = F.pad((x - self.mean) / self.std, (0, (1 - width) % 8, 0, (1 - height) % 8))
        logits = self.net(x)
        return _upsample_axis(_upsample_axis(logits, 2, height), 3, width)


def _upsample_axis(logits: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """Logits resized along an axis to its first `length` pixels, logit i on pixel 8i.

    This is corner-aligned bilinear resizing and cropping in one; a separate crop would restrict an exported
    program to sizes that need one.
    """
    pixel = torch.arange(length, device=logits.device)
    before = pixel // STRIDE
    after = (before + 1).clamp(max=logits.shape[axis] - 1)
    share = ((pixel % STRIDE) / STRIDE).to(logits.dtype).view(-1, *[1] * (3 - axis))
    return logits.index_select(axis, before) * (1 - share) + logits.index_select(axis, after) * share
