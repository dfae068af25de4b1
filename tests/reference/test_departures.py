"""The program that measures the departures from the authors' solver sees them where they are, and nothing elsewhere."""

from pathlib import Path

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from tests.reference.departures import Case, crops, differences


def _case(batch: Batch) -> Case:
    torch.manual_seed(0)
    return Case(DeepLabV2("resnet_tiny", 21, norm=norm_factory("frozen")).train(), batch)


def test_uneven_crops_average_differently_and_the_other_terms_differ_little(sample_shards: Path) -> None:
    batch = crops(str(sample_shards / "train.json"), crop_size=65, num_images=4, num_classes=21)
    batch.label[0, 20:] = 255  # one image with few valid pixels
    found = differences(_case(batch))
    assert 0.05 < found["average of images instead of pixels"] < 2
    assert 0 < found["rounded mean colour"] < 1e-3
    assert 0 < found["0.75 loss on the full grid (three scales)"] < 0.5


def test_images_of_equally_many_valid_pixels_have_one_average(sample_shards: Path) -> None:
    batch = crops(str(sample_shards / "train.json"), crop_size=65, num_images=4, num_classes=21)
    batch.label[batch.label == 255] = 0
    assert differences(_case(batch))["average of images instead of pixels"] < 1e-5
