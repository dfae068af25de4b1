"""A checkpoint as a network that scores, predicts and is exported."""

from typing import Any

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.weights import Variant


def load_network(saved: dict[str, Any]) -> DeepLabV2:
    """Return a checkpoint's network in eval mode, on the CPU.

    saved: a checkpoint's content (`training.resume.read_checkpoint`): `model`, `variant` and `config` are used. What
    the network expects of its input is `Variant.from_plain(saved["variant"]).preprocessing`, its classes are named by
    `saved["class_names"]`.
    """
    norm = norm_factory("frozen")  # all modes are alike in evaluation and share their names
    variant, config = Variant.from_plain(saved["variant"]), saved["config"]
    net = DeepLabV2(config["model"]["backbone"], config["data"]["num_classes"], norm=norm, **variant.geometry)
    net.load_state_dict(saved["model"])
    return net.eval()
