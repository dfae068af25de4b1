"""Scale, flip and crop equal a per-pixel computation; padding is void; the grid is 8k+1."""

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
    """A label in which every pixel differs from its neighbours', so that a shift by one pixel is seen."""
    return np.random.default_rng(seed).permutation(height * width).reshape(height, width).astype(np.uint8)


@dataclass
class Reference:
    """What `Augmentation` should give, computed pixel by pixel."""

    image: np.ndarray
    label: np.ndarray
    is_tie: np.ndarray
    content: tuple[int, int]


def augment_slowly(augmentation: Augmentation, image: np.ndarray, label: np.ndarray, draws: np.ndarray) -> Reference:
    """Cut a window out of the sample, scale it to what the crop shows, flip that, fill up with void."""
    crop, (low, high) = augmentation.crop_size, augmentation.scale_range
    height, width = label.shape
    scale = low + draws[0] * (high - low)
    (top, shown_y, rows), (left, shown_x, columns) = (
        window_slowly(length, scale, crop, draw) for length, draw in zip((height, width), draws[1:3], strict=True)
    )
    out = Reference(
        np.zeros((crop, crop, 3)),
        np.full((crop, crop), augmentation.ignore_label),
        np.zeros((crop, crop), bool),
        (rows, columns),
    )
    for i in range(rows):
        for j in range(columns):
            target = i, columns - 1 - j if augmentation.flip and draws[3] < 0.5 else j
            y = min(max((i + 0.5) * shown_y / rows - 0.5, 0), shown_y - 1)
            x = min(max((j + 0.5) * shown_x / columns - 0.5, 0), shown_x - 1)
            y0, x0 = top + int(y), left + int(x)
            y1, x1 = min(y0 + 1, top + shown_y - 1), min(x0 + 1, left + shown_x - 1)
            y, x = top + y, left + x
            fy, fx = y - y0, x - x0
            above = (1 - fx) * image[y0, x0] + fx * image[y0, x1]
            below = (1 - fx) * image[y1, x0] + fx * image[y1, x1]
            out.image[target] = (1 - fy) * above + fy * below
            out.label[target] = label[y1 if fy > 0.5 else y0, x1 if fx > 0.5 else x0]
            out.is_tie[target] = min(abs(fy - 0.5), abs(fx - 0.5)) < NEAR_TIE
    return out


def window_slowly(length: int, scale: float, crop: int, draw: float) -> tuple[int, int, int]:
    """First source pixel shown, number of them, and target pixels they become, along one axis."""
    scaled = max(1, round(length * scale))
    if scaled <= crop:
        return 0, length, scaled
    shown = min(length, max(1, round(crop / scale)))
    possible = [start for start in range(length) if start + shown <= length]
    return possible[min(int(draw * len(possible)), len(possible) - 1)], shown, crop


unit = st.floats(0, 1, exclude_max=True)
all_draws = st.tuples(unit, unit, unit, unit).map(np.array)


@settings(max_examples=40)
@given(
    height=st.integers(1, 45),
    width=st.integers(1, 45),
    crop=st.sampled_from([9, 17, 33]),
    low=st.floats(0.3, 2.0),
    spread=st.floats(0, 1.5),
    flip=st.booleans(),
    draws=all_draws,
)
def test_augmentation_equals_computing_every_pixel(
    height: int, width: int, crop: int, low: float, spread: float, flip: bool, draws: np.ndarray
) -> None:
    augmentation = Augmentation(crop, (low, low + spread), flip, VOID)
    image, label = smooth_image(height, width), noise_label(height, width)
    expected = augment_slowly(augmentation, image, label, draws)
    got_image, got_label, content = augmentation(image, label, draws)
    assert content == expected.content
    assert got_image.dtype == got_label.dtype == np.uint8
    assert got_image.shape == (crop, crop, 3)
    assert got_label.shape == (crop, crop)
    assert (got_label == expected.label)[~expected.is_tie].all()
    assert np.abs(got_image - expected.image).max() <= 1, "OpenCV rounds weights to 1/2048"
    outside = np.ones((crop, crop), bool)
    outside[: content[0], : content[1]] = False
    assert (got_label[outside] == VOID).all()
    assert (got_image[outside] == 0).all()


@settings(max_examples=20)
@given(draws=all_draws, size=st.sampled_from([9, 33, 321]))
def test_at_scale_1_a_sample_of_the_crops_size_is_itself_or_its_flipped_image(draws: np.ndarray, size: int) -> None:
    image, label = smooth_image(size, size), noise_label(size, size)
    got_image, got_label, content = Augmentation(size, (1.0, 1.0), True, VOID)(image, label, draws)
    if draws[3] < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    assert content == (size, size)
    assert (got_label == label).all()
    assert (got_image == image).all()


def test_without_flip_nothing_is_flipped() -> None:
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


@pytest.mark.parametrize(("scale", "scaled"), [(0.5, 16), (0.75, 25), (1.0, 33), (1.5, 50), (2.0, 66)])
def test_a_scaled_sample_has_n_times_s_pixels(scale: float, scaled: int) -> None:
    _, label, content = Augmentation(73, (scale, scale), False, VOID)(
        smooth_image(33, 33), noise_label(33, 33), np.zeros(4)
    )
    assert content == (scaled, scaled)
    assert (label[scaled:] == VOID).all()


def test_a_label_doubled_is_every_label_twice() -> None:
    label = noise_label(8, 8)
    _, got, _ = Augmentation(17, (2.0, 2.0), False, VOID)(smooth_image(8, 8), label, np.zeros(4))
    assert (got[:16, :16] == label.repeat(2, axis=0).repeat(2, axis=1)).all()


def test_whole_scaled_samples_are_those_of_cv2_resize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    got, _, (rows, columns) = Augmentation(65, (1.37, 1.37), False, VOID)(image, noise_label(30, 41), np.zeros(4))
    assert (rows, columns) == (41, 56)
    assert np.abs(got[:rows, :columns].astype(int) - cv2.resize(image, (56, 41)).astype(int)).max() <= 1


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
