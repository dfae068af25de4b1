"""What a network expects of its input. It belongs to the weights and travels with every checkpoint."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Preprocessing:
    """Channel order, mean and standard deviation (of 0..255 values, in that order) of a family of weights."""

    channels: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalize(self, image: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        """Normalised float32 [B, 3, H, W] of uint8 RGB [B, 3, H, W], exactly 0 (the mean) outside the content.

        content: int64 [B, 2], height and width of the part at the top left that is not padding. Runs on the device of
        `image`, without synchronisation.
        """
        mean = torch.tensor(self.mean, device="cpu").to(image.device, non_blocking=True).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device="cpu").to(image.device, non_blocking=True).view(1, 3, 1, 1)
        ordered = image.flip(1) if self.channels == "bgr" else image
        inside = _content_mask(image.shape[2:], content.to(image.device, non_blocking=True))
        return ((ordered.float() - mean) / std).mul_(inside)


CAFFE = Preprocessing("bgr", mean=(104.00698793, 116.66876762, 122.67891434), std=(1.0, 1.0, 1.0))
"""Mean of ImageNet as the Caffe models subtract it (DeepLab-v2 prototxt `mean_value`)."""

CAFFE_ROUNDED = Preprocessing("bgr", mean=(104.008, 116.669, 122.675), std=(1.0, 1.0, 1.0))
"""The same mean as kazuto1011's `voc12.yaml` and isht7's `evalpyt.py` round it."""

TORCHVISION = Preprocessing("rgb", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
"""ImageNet mean and standard deviation times 255 (torchvision `ImageClassification` preset)."""


def _content_mask(size: torch.Size, content: torch.Tensor) -> torch.Tensor:
    """Mask, bool [B, 1, H, W], true inside each image's content."""
    rows = torch.arange(size[0], device=content.device).view(1, 1, -1, 1)
    columns = torch.arange(size[1], device=content.device).view(1, 1, 1, -1)
    return (rows < content[:, 0].view(-1, 1, 1, 1)) & (columns < content[:, 1].view(-1, 1, 1, 1))
