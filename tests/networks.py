"""Small networks for tests of what comes after training."""

from pathlib import Path
from typing import Any

import torch

from dist_deeplab.checkpointing.file import save_content
from dist_deeplab.config import RunConfig, config_to_dict
from dist_deeplab.data.voc import CLASS_NAMES
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.weights import SCRATCH


def discerning_network(num_classes: int, images: torch.Tensor | None = None) -> DeepLabV2:
    """A network in evaluation mode that tells classes apart: random weights, statistics of random images.

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


def checkpoint_of(net: DeepLabV2) -> dict[str, Any]:
    """Content of a checkpoint of a resnet_tiny for VOC's classes, without an optimizer's state."""
    config = RunConfig.model_validate(
        {"model": {"backbone": "resnet_tiny"}, "precision": {"dtype": "fp32"}, "data": {"num_workers": 0}}
    )
    content = {"model": net.state_dict(), "variant": SCRATCH.to_plain(), "config": config_to_dict(config)}
    return content | {"optimizer": {}, "step": 7, "class_names": list(CLASS_NAMES), "train_keys_sha256": ""}


def write_checkpoint(path: Path, content: dict[str, Any]) -> Path:
    """Write a checkpoint and its sidecar, and return its path."""
    save_content(path, content, step=content["step"])
    return path
