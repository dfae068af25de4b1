"""Curves and bars are to be seen, and names to be read, however many and long they are."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from dist_deeplab.comparison.figure import comparison_figure
from dist_deeplab.comparison.record import RunRecord
from dist_deeplab.comparison.settings import compare
from dist_deeplab.evaluation.figures import render

CURVES = ("val/mIoU", "train/loss", "lr/backbone")


def _record(number: int, *, classes: list[str], steps: tuple[int, ...] = (1, 2), **settings: str) -> RunRecord:
    curves = {key: [(step, 0.5 + 0.01 * number) for step in steps] for key in CURVES}
    curves |= {f"val/iou/{name}": [(step, 0.5) for step in steps] for name in classes}
    return RunRecord(f"a_run_with_a_name_as_long_as_names_are-{number}", "", "FINISHED", settings, curves)


def _drawn(records: list[RunRecord]) -> Figure:
    figure = comparison_figure(compare(records))
    render(figure)
    return figure


@pytest.mark.parametrize("num_classes", [3, 25, 26, 60, 150])
@pytest.mark.parametrize("name", ["c{}", "a class with a name that is very long {}"])
def test_names_of_classes_do_not_overlap_or_squeeze_the_bars(num_classes: int, name: str) -> None:
    figure = _drawn([_record(0, classes=[name.format(c) for c in range(num_classes)])])
    axes = figure.subfigs[1].axes[0]
    assert axes.get_window_extent().height > 200
    labels = axes.get_xticklabels()
    assert [label.get_text()[-3:] for label in labels[1:3]] == [name.format(c)[-3:] for c in (1, 2)]
    assert max(len(label.get_text()) for label in labels) <= 25
    centers = [label.get_transform().transform(label.get_position())[0] for label in labels]
    between = min(after - before for before, after in pairwise(centers))
    turned = np.sin(np.radians(labels[0].get_rotation()))
    assert between * turned > labels[0].get_fontsize() * 100 / 72, "from a line of text to the next, pixels"
    for label in labels:
        box = label.get_window_extent()
        assert figure.bbox.padded(1).contains(box.x0, box.y0)


def test_the_legend_of_ten_long_names_is_inside_the_figure() -> None:
    figure = _drawn([_record(i, classes=[], **{"model.init": 40 * str(i)}) for i in range(10)])
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_curve_of_one_point_has_a_marker_and_whiskers_for_its_seeds() -> None:
    one, more = [_drawn([_record(0, classes=[], steps=steps)]).subfigs[0].axes for steps in ((1,), (1, 2))]
    assert [axes.lines[0].get_marker() for axes in one] == ["o", "o", "o"]
    assert [axes.lines[0].get_marker() for axes in more] == ["o", "None", "None"]
    seeds = [_record(seed, classes=[], steps=(1,), seed=str(seed)) for seed in range(2)]
    assert all(axes.containers for axes in _drawn(seeds).subfigs[0].axes)
