"""The facts about VOC: 21 classes, the palette of its own masks, void."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.data import voc


def test_there_are_21_distinct_classes_with_background_first() -> None:
    assert len(voc.CLASS_NAMES) == len(set(voc.CLASS_NAMES)) == 21
    assert (voc.CLASS_NAMES[0], voc.CLASS_NAMES[15], voc.CLASS_NAMES[20]) == ("background", "person", "tvmonitor")
    assert list(voc.CLASS_NAMES[1:]) == sorted(voc.CLASS_NAMES[1:]), "VOC's classes are in alphabetical order"


def test_the_palette_equals_vocs_label_colormap_bit_by_bit() -> None:
    for index in range(256):
        color, bits = [0, 0, 0], index
        for place in range(8):  # VOClabelcolormap.m
            for channel in range(3):
                color[channel] |= ((bits >> channel) & 1) << (7 - place)
            bits >>= 3
        assert voc.PALETTE[index].tolist() == color


@pytest.mark.parametrize(
    ("index", "color"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (2, (0, 128, 0)),
        (15, (192, 128, 128)),
        (20, (0, 64, 128)),
        (255, (224, 224, 192)),
    ],
)
def test_well_known_colors(index: int, color: tuple[int, int, int]) -> None:
    assert tuple(voc.PALETTE[index].tolist()) == color


def test_the_palette_can_not_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        voc.PALETTE[0] = 1


def test_a_saved_palette_png_holds_indices_and_shows_vocs_colors(tmp_path: Path) -> None:
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    voc.save_palette_png(label, tmp_path / "label.png")
    with Image.open(tmp_path / "label.png") as png:
        assert (png.format, png.mode) == ("PNG", "P")
        assert (np.array(png) == label).all()
        assert (np.array(png.convert("RGB")) == voc.PALETTE[label]).all()


def test_the_splits_have_their_published_sizes() -> None:
    assert voc.SPLIT_SIZES == {"train": 1464, "val": 1449, "trainval": 2913, "train_aug": 10_582}
    assert voc.SPLIT_SIZES["trainval"] == voc.SPLIT_SIZES["train"] + voc.SPLIT_SIZES["val"]
