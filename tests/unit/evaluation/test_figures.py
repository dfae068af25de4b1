"""Figures show what they say, and panels are comparable from one evaluation to the next."""

from collections.abc import Sequence

import numpy as np
import pytest

from dist_deeplab.data.voc import CLASS_NAMES, PALETTE
from dist_deeplab.evaluation.confusion import scores
from dist_deeplab.evaluation.evaluator import Evaluation, Panel
from dist_deeplab.evaluation.figures import (
    confusion_figure,
    iou_figure,
    panel_images,
    panels_figure,
    render,
    trimap_figure,
)


def _panel(pred: np.ndarray, key: str = "image") -> Panel:
    label = np.zeros_like(pred)
    label[:2] = 255
    return Panel(key, np.full((*pred.shape, 3), 128, dtype=np.uint8), label, pred, 0.5)


def _has_color(image: np.ndarray, color: "tuple[int, ...] | np.ndarray") -> int:
    return int((image == np.asarray(color)).all(axis=2).sum())


@pytest.mark.parametrize("num_wrong", [0, 5, 20])
@pytest.mark.parametrize("names", [CLASS_NAMES, ["void", *(f"a class with a long name, {i}" for i in range(20))]])
def test_a_panels_image_keeps_its_size_whatever_is_predicted(num_wrong: int, names: Sequence[str]) -> None:
    pred = np.zeros((50, 70), dtype=np.uint8)
    for c in range(1, num_wrong + 1):
        pred[10:40, 3 * c : 3 * c + 2] = c
    images = panel_images(Evaluation(np.eye(21), 2, 255, [_panel(pred, "a"), _panel(pred, "b")]), names)
    assert list(images) == ["a", "b"]
    plain = panel_images(Evaluation(np.eye(21), 1, 255, [_panel(np.zeros_like(pred))]), names)["image"]
    for image in images.values():
        assert image.dtype == np.uint8
        assert image.shape == plain.shape
        assert image.shape[1] == 1200
        for c in range(1, num_wrong + 1):
            assert _has_color(image, PALETTE[c])


@pytest.mark.parametrize("num_classes", [1, 6, 21, 150])
@pytest.mark.parametrize("name", ["x", "a class with a longer name, {}", "WIDE {}", "a$b$ {}", "W" * 200 + "{}"])
def test_the_legend_is_inside_the_figure_below_the_panels(num_classes: int, name: str) -> None:
    pred = np.tile(np.arange(num_classes, dtype=np.uint8)[:, None], (2, 90))
    names = [name.format(c) for c in range(num_classes)]
    figure = panels_figure([_panel(pred)], names, ignore_label=255)
    height = render(figure).shape[0]
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= 1200
    assert 0 <= box.y0 < box.y1 <= height - max(image.get_extent()[2] for image in figure.axes[0].images) * 100
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[-3:] == ["void", "wrong", "right"]
    assert len(shown) > 3


def test_names_that_differ_at_the_end_still_differ_in_the_legend() -> None:
    names = ["a name that is much longer than a legend's column " + end for end in ("one", "two")]
    pred = np.repeat(np.uint8([[0], [1]]), 8, axis=0).repeat(9, axis=1)
    shown = panels_figure([_panel(pred)], names, ignore_label=255).legends[0].get_texts()
    assert [text.get_text()[-4:] for text in shown[:2]] == [" one", " two"]


def test_the_legend_keeps_the_classes_with_most_pixels_where_there_are_too_many() -> None:
    names = [f"class {c}" for c in range(150)]
    pred = np.zeros((60, 60), dtype=np.uint8)
    pred[5:45] = np.arange(40)[:, None] + 100  # 40 small classes
    pred[45:] = 7
    few = render(panels_figure([_panel(pred)], names, ignore_label=255))
    none = render(panels_figure([_panel(np.zeros_like(pred))], names, ignore_label=255))
    assert few.shape == none.shape
    pixels_of_7 = 15 * 60 * (few.shape[1] / 4 / 60) ** 2
    assert _has_color(few, PALETTE[7]) > 0.9 * pixels_of_7 + 200  # the prediction's, and the legend's patch


def test_a_class_without_ground_truth_is_marked_in_the_matrix() -> None:
    axes = confusion_figure(np.array([[3, 1], [0, 0]]), ("cat", "dog")).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog (none)"]


def test_the_matrix_leaves_out_classes_that_are_neither_true_nor_predicted() -> None:
    confusion = np.zeros((4, 4), dtype=np.int64)
    confusion[0, 0], confusion[2, 0], confusion[2, 3] = 6, 1, 3
    axes = confusion_figure(confusion, list("abcd")).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "d (none)"]
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [
        ((0, 0), "100"),
        ((0, 1), "25"),
        ((2, 1), "75"),
    ]
    assert axes.get_title().endswith("\n1 of 4 classes neither true nor predicted")


@pytest.mark.parametrize("num_present", [2, 8, 21])
@pytest.mark.parametrize("names", [CLASS_NAMES, [f"a class with quite a long name, {i}" for i in range(21)]])
def test_titles_and_names_are_inside_the_figure(num_present: int, names: Sequence[str]) -> None:
    confusion = np.zeros((21, 21), dtype=np.int64)
    confusion[:num_present, :num_present] = 1
    result = scores(confusion)
    for figure in (confusion_figure(confusion, names), iou_figure(result, names), trimap_figure({1: result}, result)):
        render(figure)
        axes = figure.axes[0]
        named = [t for t in (*axes.get_xticklabels(), *axes.get_yticklabels()) if t.get_text() in names]
        labels = [label for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()]
        for text in (axes.title, *labels, *named):
            extent = text.get_window_extent()
            assert figure.bbox.padded(1).contains(extent.x0, extent.y0), text
            assert figure.bbox.padded(1).contains(extent.x1, extent.y1), text


@pytest.mark.parametrize("name", ["x", "a class with quite a long name, {}", "W" * 60 + "{}"])
def test_the_bars_keep_their_width_and_the_title_is_whole_beside_names_of_any_length(name: str) -> None:
    result = scores(np.diag([1] * 10 + [0] * 11))
    figure = iou_figure(result, [name.format(c) for c in range(21)])
    render(figure)
    axes = figure.axes[0]
    assert axes.get_window_extent().width > 650
    title = axes.title.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width


def test_a_name_with_dollars_is_not_a_formula() -> None:
    names, confusion = ["$_$^", "dog"], np.array([[3, 1], [0, 2]])
    panels = panels_figure([_panel(np.zeros((9, 9), np.uint8), "$_$^")], names, ignore_label=255)
    for figure in (confusion_figure(confusion, names), iou_figure(scores(confusion), names), panels):
        render(figure)


def test_the_bars_are_of_the_classes_that_exist_in_0_to_1() -> None:
    confusion = np.diag([3, 0, 2])
    confusion[2, 1] = 2
    axes = iou_figure(scores(confusion), ["background", "cat", "dog"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["background", "dog"]
    assert [patch.get_width() for patch in axes.patches] == [1.0, 0.5]
    assert axes.get_title() == "mIoU 0.7500 (dashed); 1 of 3 classes not in this set"
    assert axes.patches[1].get_facecolor()[:3] == pytest.approx(PALETTE[2] / 255), "a class keeps its colour"
