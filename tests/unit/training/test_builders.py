"""What cannot be built is refused with what to set instead."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab.config import config_from_dict, config_to_dict, load_config
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.errors import UserError
from dist_deeplab.model.preprocessing import CAFFE_ROUNDED, TORCHVISION
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import build_loss, build_network, network_variant
from dist_deeplab.training.data_builders import follow_manifest
from dist_deeplab.training.loss import CrossEntropy, balanced_weights


@pytest.mark.parametrize("setting", ["model.sync_bn=torch", "speed.compile=true"])
def test_not_every_batch_norm_takes_empty_micro_batches(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = load_config(None, ["model.backbone=resnet_tiny", setting])
    name = setting.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"{name} .* 4 images .* on 3 processes .*batch\.micro_size=2 or more, or {name}="
    ):
        build_network(config, BatchSplit(4, 1, 3), SCRATCH, None)
    build_network(config, BatchSplit(4, 2, 3), SCRATCH, None)
    frozen = load_config(None, ["model.backbone=resnet_tiny", "model.batch_norm=frozen", setting])
    build_network(frozen, BatchSplit(4, 1, 3), SCRATCH, None)


def _train_set(**values: Any) -> Manifest:
    facts = {"split": "train", "num_samples": 1, "keys_sha256": "0" * 64, "index": "train.index.npy"}
    facts |= {"index_sha256": "0" * 64, "shards": (), "path": Path("train.json"), "ignore_label": 255}
    return Manifest(**facts, **values)


def test_automatic_class_weights_are_the_training_set_s_and_are_kept_as_numbers() -> None:
    config = load_config(None, ["loss.class_weights=auto"])
    train_set = _train_set(num_classes=2, class_names=("background", "road"), class_pixels=(900, 100))
    followed = follow_manifest(config, train_set)
    assert followed.loss.class_weights == balanced_weights((900, 100)) == (0.555556, 5.0)
    assert build_loss(followed) == CrossEntropy(255, (0.555556, 5.0))
    assert config_from_dict(config_to_dict(followed), where="a checkpoint") == followed
    assert build_loss(follow_manifest(load_config(None, []), train_set)) == CrossEntropy(255)


def test_a_mean_colour_that_is_given_replaces_the_weights_in_their_order_of_channels() -> None:
    config = load_config(None, ["model.mean_bgr=[104.008,116.669,122.675]"])
    assert network_variant(config, SCRATCH) == replace(SCRATCH, preprocessing=CAFFE_ROUNDED)
    rgb = network_variant(config, replace(SCRATCH, preprocessing=TORCHVISION)).preprocessing
    assert (rgb.channels, rgb.mean, rgb.std) == ("rgb", (122.675, 116.669, 104.008), TORCHVISION.std)
    assert network_variant(load_config(None, []), SCRATCH) is SCRATCH
