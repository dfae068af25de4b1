"""Small networks for tests of what comes after training."""

import torch

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2


def discerning_network(num_classes: int, images: torch.Tensor | None = None) -> DeepLabV2:
    """Return a network in evaluation mode that tells classes apart: random weights, statistics of random images.

    With the statistics that batch norm starts with, every pixel would be of the same class. `images`: normalised,
    float [B, 3, H, W]; noise unless given.
    """
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", num_classes, norm=norm_factory("local"))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(100 * torch.randn(4, 3, 65, 65) if images is None else images)
    return net.eval()
