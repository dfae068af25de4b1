"""Photometric distortion equals one plain operation after another; which ones, the draws alone say."""

import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_deeplab.data.photometric import NUM_DRAWS, distort
from dist_deeplab.data.transforms import Augmentation

OFF = np.array([0.5, 0.0] * 4 + [0.0])
BRIGHTNESS, CONTRAST, SATURATION, HUE, LATE = 0, 2, 4, 6, 8
unit = st.floats(0, 1, exclude_max=True)


def noise(height: int = 12, width: int = 17, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(**amounts: float) -> np.ndarray:
    """Draws that choose these operations."""
    draws = OFF.copy()
    for name, amount in amounts.items():
        first = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}[name]
        draws[first : first + 2] = 0.0, amount
    return draws


def cut(values: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def distort_slowly(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """As mmsegmentation's pipeline: each operation on the whole image, saturation and hue in a conversion each."""

    def contrast(image: np.ndarray) -> np.ndarray:
        return cut(image * (0.5 + draws[CONTRAST + 1])) if draws[CONTRAST] < 0.5 else image

    if draws[BRIGHTNESS] < 0.5:
        image = cut(image.astype(float) - 32 + 64 * draws[BRIGHTNESS + 1])
    if draws[LATE] < 0.5:
        image = contrast(image)
    if draws[SATURATION] < 0.5 or draws[HUE] < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if draws[SATURATION] < 0.5:
            hsv[..., 1] = cut(hsv[..., 1] * (0.5 + draws[SATURATION + 1]))
        if draws[HUE] < 0.5:
            hsv[..., 0] = (hsv[..., 0].astype(int) + range(-18, 19)[int(37 * draws[HUE + 1])]) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if draws[LATE] < 0.5 else contrast(image)


@settings(max_examples=100, deadline=None)
@given(draws=st.lists(unit, min_size=NUM_DRAWS, max_size=NUM_DRAWS).map(np.array), seed=st.integers(0, 100))
def test_tables_give_what_one_operation_after_another_gives(draws: np.ndarray, seed: int) -> None:
    image = noise(seed=seed)
    before = image.copy()
    got = distort(image, draws)
    assert got.dtype == np.uint8
    assert (got == distort_slowly(image, draws)).all()
    assert (image == before).all(), "the decoded image may be shown again"


def test_draws_of_a_half_or_more_leave_the_image_alone() -> None:
    assert (distort(noise(), OFF) == noise()).all()


@pytest.mark.parametrize(("amount", "change"), [(0.0, -32), (0.5, 0), (0.75, 16)])
def test_brightness_adds_up_to_32(amount: float, change: int) -> None:
    got = distort(noise(), drawn(brightness=amount))
    assert (got == np.clip(noise().astype(int) + change, 0, 255)).all()


def test_contrast_multiplies_by_a_half_to_one_and_a_half() -> None:
    assert (distort(noise(), drawn(contrast=0.0)) == cut(noise() * 0.5)).all()
    assert (distort(noise(), drawn(contrast=0.5)) == noise()).all()


def test_hue_turns_by_up_to_36_degrees_and_leaves_grey_alone() -> None:
    grey = np.repeat(noise()[..., :1], 3, axis=2)
    assert (distort(grey, drawn(hue=0.0, saturation=0.9)) == grey).all()
    for amount, degrees in ((0.0, -36), (0.5, 0), (0.999, 36)):
        red = np.full((1, 1, 3), (200, 40, 40), dtype=np.uint8)
        hue, _, value = colorsys.rgb_to_hsv(*(distort(red, drawn(hue=amount))[0, 0] / 255))
        assert (hue * 360 + 180) % 360 - 180 == pytest.approx(degrees, abs=2)
        assert value * 255 == pytest.approx(200, abs=1)


@settings(max_examples=20, deadline=None)
@given(draws=st.lists(unit, min_size=4 + NUM_DRAWS, max_size=4 + NUM_DRAWS).map(np.array))
def test_distortion_changes_neither_where_an_image_lies_nor_its_padding(draws: np.ndarray) -> None:
    image, label = noise(30, 20), np.random.default_rng(1).integers(0, 21, (30, 20), dtype=np.uint8)
    plain = Augmentation(33, (0.5, 1.5), True, 255)(image, label, draws[:4])
    distorted = Augmentation(33, (0.5, 1.5), True, 255, photometric=True)(image, label, draws)
    assert (distorted[1] == plain[1]).all()
    rows, columns = plain[2]
    assert distorted[2] == (rows, columns)
    assert (distorted[0][:rows, :columns] == distort_slowly(plain[0][:rows, :columns], draws[4:])).all()
    assert not distorted[0][rows:].any()
    assert not distorted[0][:, columns:].any()
