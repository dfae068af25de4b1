"""Confusion matrix and scores equal slow loops; void and absent classes never count."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.evaluation.confusion import count_pixels, image_mious, scores


def _slow_confusion(label: np.ndarray, pred: np.ndarray, num_classes: int, ignore_label: int) -> np.ndarray:
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for true, predicted in zip(label.ravel().tolist(), pred.ravel().tolist(), strict=True):
        if true != ignore_label:
            matrix[true, predicted] += 1
    return matrix


def _slow_iou(label: np.ndarray, pred: np.ndarray, num_classes: int, ignore_label: int) -> list[float]:
    """Per-class IoU straight from the pixels, NaN for a class that no pixel has."""
    valid = label != ignore_label
    label, pred = label[valid], pred[valid]
    ious = []
    for c in range(num_classes):
        intersection = sum(1 for t, p in zip(label.tolist(), pred.tolist()) if t == c and p == c)
        union = sum(1 for t, p in zip(label.tolist(), pred.tolist()) if t == c or p == c)
        ious.append(intersection / union if c in label else float("nan"))
    return ious


@st.composite
def _label_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """label, pred, number of classes and void label of some small label maps."""
    num_classes = draw(st.integers(2, 6))
    ignore_label = draw(st.sampled_from([255, num_classes, 0]))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = draw(st.integers(1, num_classes))  # fewer classes than there are leaves some absent
    label = rng.integers(0, used, shape).astype(np.uint8)
    label[rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore_label
    pred = np.where(rng.random(shape) < 0.5, label % num_classes, rng.integers(0, num_classes, shape)).astype(np.uint8)
    return label, pred, num_classes, ignore_label


@given(_label_maps())
def test_confusion_matrix_equals_the_slow_reference(label_maps: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    label, pred, num_classes, ignore_label = label_maps
    band = np.random.default_rng(int(label.sum())).integers(0, 3, label.shape).astype(np.uint8)
    options = {"num_classes": num_classes, "ignore_label": ignore_label}
    tensors = torch.from_numpy(label), torch.from_numpy(pred)
    whole = count_pixels(*tensors, **options)
    banded = count_pixels(*tensors, **options, band=torch.from_numpy(band), num_bands=3)
    assert whole.dtype == banded.dtype == torch.int64
    assert whole.shape == (len(label), 1, num_classes, num_classes)
    assert banded.shape == (len(label), 3, num_classes, num_classes)
    for image in range(len(label)):
        expected = _slow_confusion(label[image], pred[image], num_classes, ignore_label)
        np.testing.assert_array_equal(whole[image, 0].numpy(), expected)
        for number in range(3):
            only = np.where(band[image] == number, label[image], ignore_label)
            expected = _slow_confusion(only, pred[image], num_classes, ignore_label)
            np.testing.assert_array_equal(banded[image, number].numpy(), expected)


@pytest.mark.quick("P4")
@given(_label_maps())
def test_scores_equal_the_slow_reference(label_maps: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    label, pred, num_classes, ignore_label = label_maps
    matrix = _slow_confusion(label, pred, num_classes, ignore_label)
    if not matrix.sum():
        with pytest.raises(ValueError, match="empty"):
            scores(matrix)
        return
    result = scores(matrix)
    ious = _slow_iou(label, pred, num_classes, ignore_label)
    valid = label != ignore_label
    present = [c for c in range(num_classes) if c in label[valid]]
    np.testing.assert_allclose(result.iou, ious)
    assert result.miou == pytest.approx(np.mean([ious[c] for c in present]))
    assert result.pixel_accuracy == pytest.approx(np.mean(label[valid] == pred[valid]))
    assert result.mean_accuracy == pytest.approx(np.mean([np.mean(pred[valid & (label == c)] == c) for c in present]))
    assert result.fwiou == pytest.approx(sum(np.mean(label[valid] == c) * ious[c] for c in present))
    assert result.num_absent == num_classes - len(present)


@pytest.mark.quick("P4")
def test_what_is_predicted_on_void_pixels_does_not_matter() -> None:
    label = torch.tensor([[[0, 1, 255, 255]]])
    matrices = [
        count_pixels(label, torch.tensor([[[0, 1, *void]]]), num_classes=2, ignore_label=255)
        for void in ([0, 0], [1, 1])
    ]
    assert torch.equal(*matrices)
    assert matrices[0].tolist() == [[[[1, 0], [0, 1]]]]


def test_an_absent_class_is_nan_even_where_it_was_predicted_and_is_left_out_of_the_means() -> None:
    result = scores(np.array([[6, 0, 2], [0, 4, 0], [0, 0, 0]]))
    assert result.iou[:2].tolist() == [6 / 8, 1.0]
    assert np.isnan(result.iou[2])
    assert result.miou == pytest.approx((6 / 8 + 1) / 2)
    assert result.mean_accuracy == pytest.approx((6 / 8 + 1) / 2)
    assert result.pixel_accuracy == pytest.approx(10 / 12)
    assert result.num_absent == 1


def test_a_class_that_is_never_found_scores_0_and_counts() -> None:
    result = scores(np.array([[5, 0], [5, 0]]))
    assert result.iou.tolist() == [0.5, 0.0]
    assert result.miou == 0.25
    assert result.num_absent == 0


def test_an_empty_matrix_is_an_error_and_no_score() -> None:
    with pytest.raises(ValueError, match="all pixels are void"):
        scores(np.zeros((3, 3), dtype=np.int64))


def test_counts_of_a_large_set_do_not_overflow() -> None:
    pixels = 2**40
    result = scores(np.array([[pixels, 0], [pixels, pixels]]))
    assert result.iou.tolist() == [0.5, 0.5]


def test_an_images_own_miou_is_over_the_classes_it_shows_or_was_said_to_show() -> None:
    matrices = [[[2, 1, 0], [0, 1, 0], [0, 0, 0]], [[2, 0, 1], [0, 0, 0], [0, 0, 0]], np.zeros((3, 3)).tolist()]
    first, second, void = image_mious(torch.tensor(matrices).long()).tolist()
    assert first == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert second == pytest.approx((2 / 3 + 0) / 2)
    assert np.isnan(void)
