"""Figures show what they say, and panels are comparable from one evaluation to the next."""

import numpy as np
import pytest

from dist_deeplab.data.voc import CLASS_NAMES, PALETTE
from dist_deeplab.evaluation.confusion import scores
from dist_deeplab.evaluation.evaluator import Evaluation, Panel
from dist_deeplab.evaluation.figures import confusion_figure, iou_figure, panel_pictures, panels_figure, picture


def _panel(pred: np.ndarray, key: str = "image") -> Panel:
    label = np.zeros_like(pred)
    label[:2] = 255
    return Panel(key, np.full((*pred.shape, 3), 128, dtype=np.uint8), label, pred, 0.5)


def _has_color(shot: np.ndarray, color: "tuple[int, ...] | np.ndarray") -> int:
    return int((shot == np.asarray(color)).all(axis=2).sum())


@pytest.mark.parametrize("num_wrong", [0, 5, 20])
def test_a_panels_picture_keeps_its_size_whatever_is_predicted(num_wrong: int) -> None:
    pred = np.zeros((50, 70), dtype=np.uint8)
    for c in range(1, num_wrong + 1):
        pred[10:40, 3 * c : 3 * c + 2] = c
    shots = panel_pictures(Evaluation(np.eye(21), 2, 255, [_panel(pred, "a"), _panel(pred, "b")]), CLASS_NAMES)
    assert list(shots) == ["a", "b"]
    plain = panel_pictures(Evaluation(np.eye(21), 1, 255, [_panel(np.zeros_like(pred))]), CLASS_NAMES)["image"]
    for shot in shots.values():
        assert shot.dtype == np.uint8
        assert shot.shape == plain.shape
        assert shot.shape[1] == 1200
        for c in range(1, num_wrong + 1):
            assert _has_color(shot, PALETTE[c])


def test_the_legend_keeps_the_classes_with_most_pixels_where_there_are_too_many() -> None:
    names = [f"class {c}" for c in range(150)]
    pred = np.zeros((60, 60), dtype=np.uint8)
    pred[5:45] = np.arange(40)[:, None] + 100  # 40 small classes
    pred[45:] = 7
    few = picture(panels_figure([_panel(pred)], names, ignore_label=255))
    none = picture(panels_figure([_panel(np.zeros_like(pred))], names, ignore_label=255))
    assert few.shape == none.shape
    pixels_of_7 = 15 * 60 * (few.shape[1] / 4 / 60) ** 2
    assert _has_color(few, PALETTE[7]) > 0.9 * pixels_of_7 + 200  # the prediction's, and the legend's patch


def test_a_class_without_ground_truth_is_marked_in_the_matrix() -> None:
    axes = confusion_figure(np.array([[3, 1], [0, 0]]), ("cat", "dog")).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog (none)"]


def test_a_name_with_dollars_is_no_formula() -> None:
    names, confusion = ["$_$^", "dog"], np.array([[3, 1], [0, 2]])
    panels = panels_figure([_panel(np.zeros((9, 9), np.uint8), "$_$^")], names, ignore_label=255)
    for figure in (confusion_figure(confusion, names), iou_figure(scores(confusion), names), panels):
        picture(figure)
