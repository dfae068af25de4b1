"""A comparison as a picture: score, loss and learning rate over the steps, and every class's IoU side by side.

Imported where it is drawn: matplotlib takes a moment.
"""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state, no display

from dist_deeplab.comparison.record import MIOU, RunRecord
from dist_deeplab.comparison.table import label, rank

_MAX_RUNS = 10  # more lines can't be told apart
_CURVES = (
    (MIOU, "mIoU on the validation set (%)", 100.0),
    ("train/loss", "training loss", 1.0),
    ("lr/backbone", "learning rate (backbone)", 1.0),
)


def comparison_figure(records: Sequence[RunRecord]) -> Figure:
    """Draw the best runs (ten at most), the winner in the first colour; also for a single run."""
    shown = rank(records)[:_MAX_RUNS]
    names = [label(record, records) for record in shown]
    colors = [colormaps["tab10"](index) for index in range(len(shown))]
    classes = list(dict.fromkeys(name for record in shown for name in record.class_iou()))
    figure = Figure(figsize=(13, 4.2 + (3.8 if classes else 0)), layout="constrained")
    rows = figure.subfigures(2 if classes else 1, 1, squeeze=False)[:, 0]
    for axes, (key, title, factor) in zip(rows[0].subplots(1, 3), _CURVES, strict=True):
        for record, name, color in zip(shown, names, colors, strict=True):
            points = record.curves.get(key, [])
            steps, values = [step for step, _ in points], [factor * value for _, value in points]
            marker = "o" if key == MIOU else None
            axes.plot(steps, values, color=color, label=name, marker=marker, markersize=4, linewidth=1.5)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    if classes:
        _draw_classes(rows[1].subplots(), shown, names, classes)
    handles, texts = rows[0].axes[0].get_legend_handles_labels()
    order = "best first" if len(shown) > 1 else None
    figure.legend(handles, texts, loc="outside upper center", ncols=min(5, len(shown)), title=order)
    return figure


def _draw_classes(axes: Axes, shown: Sequence[RunRecord], names: Sequence[str], classes: Sequence[str]) -> None:
    """Draw a group of bars for each class and for the mean, a star over the best of each."""
    groups = [*classes, "mIoU"]
    width = 0.8 / len(shown)
    best: list[tuple[float, int]] = [(-1.0, 0)] * len(groups)
    for index, record in enumerate(shown):
        iou = record.class_iou()
        values = [100 * iou.get(name, 0.0) for name in classes] + [100 * (record.best or (0, 0.0))[1]]
        best = [max(known, (value, -index)) for known, value in zip(best, values, strict=True)]
        places = [group - 0.4 + (index + 0.5) * width for group in range(len(groups))]
        axes.bar(places, values, width, color=colormaps["tab10"](index), label=names[index])
    title = "IoU of each class at the best step (%)"
    if len(shown) > 1:
        title += ", * best"
        for group, (value, index) in enumerate(best):
            if value == 0:
                continue
            place = group - 0.4 + (0.5 - index) * width
            axes.annotate("*", (place, value), ha="center", va="bottom", fontsize=12)
    axes.set_xticks(range(len(groups)), groups, rotation=35, ha="right")
    axes.set(title=title, xlim=(-0.6, len(groups) - 0.4))
    axes.margins(y=0.1)  # room for the stars
    axes.grid(axis="y", alpha=0.3)
