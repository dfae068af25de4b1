"""Scale, mirror and crop equal a per-pixel computation with aligned corners; padding is void; the grid is 8k+1."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_deeplab.data.transforms import Augmentation, next_grid_size, pad_to

VOID = 255
NEAR_TIE = 0.01  # a source position this close to the middle between two pixels may go to either


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def noise_label(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a label in which every pixel differs from its neighbours', so that a shift by one pixel is seen."""
    return np.random.default_rng(seed).permutation(height * width).reshape(height, width).astype(np.uint8)


@dataclass
class Reference:
    """What `Augmentation` should give, computed pixel by pixel."""

    image: np.ndarray
    label: np.ndarray
    is_tie: np.ndarray
    content: tuple[int, int]


def augment_slowly(augmentation: Augmentation, image: np.ndarray, label: np.ndarray, draws: np.ndarray) -> Reference:
    """Scale to (n-1)s+1 with aligned corners, mirror the scaled picture, cut a window out of it, fill up with void."""
    crop, (low, high) = augmentation.crop_size, augmentation.scale_range
    height, width = label.shape
    scale = low + draws[0] * (high - low)
    scaled_height, scaled_width = (max(2, round((n - 1) * scale) + 1) for n in (height, width))
    top = math.floor(draws[1] * (max(0, scaled_height - crop) + 1))
    left = math.floor(draws[2] * (max(0, scaled_width - crop) + 1))
    content = min(scaled_height, crop), min(scaled_width, crop)
    out = Reference(
        np.zeros((crop, crop, 3)),
        np.full((crop, crop), augmentation.ignore_label),
        np.zeros((crop, crop), bool),
        content,
    )
    for i in range(content[0]):
        for j in range(content[1]):
            y = (top + i) * (height - 1) / (scaled_height - 1)
            x = (left + j) * (width - 1) / (scaled_width - 1)
            if augmentation.mirror and draws[3] < 0.5:
                x = width - 1 - x
            y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            fy, fx = y - y0, x - x0
            above = (1 - fx) * image[y0, x0] + fx * image[y0, x1]
            below = (1 - fx) * image[y1, x0] + fx * image[y1, x1]
            out.image[i, j] = (1 - fy) * above + fy * below
            out.label[i, j] = label[y1 if fy > 0.5 else y0, x1 if fx > 0.5 else x0]
            out.is_tie[i, j] = min(abs(fy - 0.5), abs(fx - 0.5)) < NEAR_TIE
    return out


unit = st.floats(0, 1, exclude_max=True)
all_draws = st.tuples(unit, unit, unit, unit).map(np.array)


@settings(max_examples=40)
@given(
    height=st.integers(2, 45),
    width=st.integers(2, 45),
    crop=st.sampled_from([9, 17, 33]),
    low=st.floats(0.3, 2.0),
    spread=st.floats(0, 1.5),
    mirror=st.booleans(),
    draws=all_draws,
)
def test_augmentation_equals_computing_every_pixel(
    height: int, width: int, crop: int, low: float, spread: float, mirror: bool, draws: np.ndarray
) -> None:
    augmentation = Augmentation(crop, (low, low + spread), mirror, VOID)
    image, label = smooth_image(height, width), noise_label(height, width)
    expected = augment_slowly(augmentation, image, label, draws)
    got_image, got_label, content = augmentation(image, label, draws)
    assert content == expected.content
    assert got_image.dtype == got_label.dtype == np.uint8
    assert got_image.shape == (crop, crop, 3)
    assert got_label.shape == (crop, crop)
    assert (got_label == expected.label)[~expected.is_tie].all()
    steepest = max(np.abs(np.diff(image.astype(int), axis=axis)).max() for axis in (0, 1))
    assert np.abs(got_image - expected.image).max() <= 1 + steepest / 16, "OpenCV knows 1/32 of a pixel"
    outside = np.ones((crop, crop), bool)
    outside[: content[0], : content[1]] = False
    assert (got_label[outside] == VOID).all()
    assert (got_image[outside] == 0).all()


@settings(max_examples=20)
@given(draws=all_draws, size=st.sampled_from([9, 33, 321]))
def test_at_scale_1_a_sample_of_the_crops_size_is_itself_or_its_mirror_image(draws: np.ndarray, size: int) -> None:
    image, label = smooth_image(size, size), noise_label(size, size)
    got_image, got_label, content = Augmentation(size, (1.0, 1.0), True, VOID)(image, label, draws)
    if draws[3] < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    assert content == (size, size)
    assert (got_label == label).all()
    assert (got_image == image).all()


def test_without_mirror_nothing_is_mirrored() -> None:
    image, label = smooth_image(9, 9), noise_label(9, 9)
    for draw in (0.0, 0.49, 0.99):
        got = Augmentation(9, (1.0, 1.0), False, VOID)(image, label, np.array([0.0, 0.0, 0.0, draw]))
        assert (got[1] == label).all()


@settings(max_examples=20)
@given(draws=all_draws)
def test_at_scale_1_a_crop_is_a_window_of_the_sample(draws: np.ndarray) -> None:
    image, label = smooth_image(30, 50), noise_label(30, 50)
    got_image, got_label, _ = Augmentation(17, (1.0, 1.0), False, VOID)(image, label, draws)
    top, left = int(draws[1] * (30 - 17 + 1)), int(draws[2] * (50 - 17 + 1))
    assert (got_label == label[top : top + 17, left : left + 17]).all()
    assert (got_image == image[top : top + 17, left : left + 17]).all()


def test_all_offsets_occur_and_the_window_never_leaves_the_sample() -> None:
    label = np.arange(12 * 12, dtype=np.uint8).reshape(12, 12)
    image = np.zeros((12, 12, 3), np.uint8)
    augmentation = Augmentation(9, (1.0, 1.0), False, VOID)
    corners = {
        int(augmentation(image, label, np.array([0.0, y, x, 0.9]))[1][0, 0])
        for y in (0.0, 0.3, 0.6, 1 - 2**-53)
        for x in (0.0, 0.3, 0.6, 1 - 2**-53)
    }
    assert corners == {12 * top + left for top in range(4) for left in range(4)}


@pytest.mark.parametrize(("scale", "scaled"), [(0.5, 17), (0.75, 25), (1.0, 33), (1.5, 49), (2.0, 65)])
def test_a_scaled_sample_keeps_its_corners(scale: float, scaled: int) -> None:
    label = noise_label(33, 33)
    image = smooth_image(33, 33)
    got_image, got_label, content = Augmentation(65, (scale, scale), False, VOID)(image, label, np.zeros(4))
    assert content == (scaled, scaled), "(n - 1) s + 1"
    last = scaled - 1
    for got, source in (((0, 0), (0, 0)), ((0, last), (0, 32)), ((last, 0), (32, 0)), ((last, last), (32, 32))):
        assert got_label[got] == label[source]
        assert (got_image[got] == image[source]).all()


def test_a_label_halved_is_every_second_label() -> None:
    label = noise_label(33, 33)
    _, got, _ = Augmentation(17, (0.5, 0.5), False, VOID)(smooth_image(33, 33), label, np.zeros(4))
    assert (got == label[::2, ::2]).all()


@settings(max_examples=30)
@given(draws=all_draws, height=st.integers(1, 40), width=st.integers(1, 40))
def test_a_label_is_never_mixed_and_image_and_label_move_together(draws: np.ndarray, height: int, width: int) -> None:
    label = np.random.default_rng(height).choice(np.array([0, 7, 255], np.uint8), (height, width))
    image = np.repeat(label[:, :, None], 3, axis=2)
    got_image, got_label, (rows, columns) = Augmentation(33, (0.5, 2.0), True, VOID)(image, label, draws)
    assert set(np.unique(got_label)) <= {0, 7, 255}
    pure = np.isin(got_image[:rows, :columns, 0], (0, 7, 255))
    same = got_image[:rows, :columns, 0] == got_label[:rows, :columns]
    assert (same | ~pure).mean() > 0.95, "where the image shows one class, the label says the same"


def test_the_label_of_padding_is_the_ignore_label_that_was_asked_for() -> None:
    _, label, content = Augmentation(17, (1.0, 1.0), False, 99)(
        np.ones((5, 8, 3), np.uint8), np.ones((5, 8), np.uint8), np.zeros(4)
    )
    assert content == (5, 8)
    assert (label[:5, :8] == 1).all()
    assert (label == 99).sum() == 17 * 17 - 5 * 8


def test_augmentation_leaves_its_arguments_alone() -> None:
    image, label, draws = smooth_image(20, 20), noise_label(20, 20), np.array([0.3, 0.4, 0.5, 0.1])
    before = image.copy(), label.copy(), draws.copy()
    Augmentation(33, (0.5, 1.5), True, VOID)(image, label, draws)
    assert all((a == b).all() for a, b in zip((image, label, draws), before, strict=True))


@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([None, 3]))
def test_padding_goes_below_and_to_the_right(height: int, width: int, channels: int | None) -> None:
    shape = (height, width) if channels is None else (height, width, channels)
    array = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    padded = pad_to(array, (9, 9), 200)
    assert padded.dtype == np.uint8
    below, right = 9 - height, 9 - width
    expected = np.pad(array, [(0, below), (0, right), (0, 0)][: array.ndim], constant_values=200)
    assert (padded == expected).all()


@given(length=st.integers(1, 10_000))
def test_next_grid_size_is_the_smallest_8k_plus_1_that_holds_the_length(length: int) -> None:
    assert next_grid_size(length) == next(size for size in range(length, length + 8) if size % 8 == 1)
