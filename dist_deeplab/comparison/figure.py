"""A comparison as a figure: score, loss and learning rate over the steps, and every class's IoU side by side.

Imported where it is drawn: matplotlib takes a moment.
"""

import math
import statistics
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.ticker import MaxNLocator

from dist_deeplab.comparison.record import MIOU
from dist_deeplab.comparison.settings import Comparison, Setting
from dist_deeplab.data.figure_names import LEGEND, legend_columns, literal, shorten, widest

_MAX_SETTINGS = 10  # more lines can't be told apart
_MAX_NAME, _MAX_LABEL = 25, 60  # characters of a class's name, of a setting's
_MANY_CLASSES = 25  # names of more classes overlap unless they are upright and small
_WIDTH_IN, _CURVES_IN, _BARS_IN, _CLASS_IN = 13.0, 4.2, 3.1, 0.14  # of a class: one upright name
_LEGEND_FONT = 10  # points
_CURVES = (
    (MIOU, "mIoU on the validation set"),
    ("train/loss", "training loss"),
    ("lr/backbone", "learning rate (backbone)"),
)


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw the best settings (ten at most), the best in the first colour; also for a single run.

    Lines and bars are means over seeds, bands and whiskers one standard deviation to either side.
    """
    shown = comparison.settings[:_MAX_SETTINGS]
    classes = [name for name in comparison.classes if any(name in setting.class_scores for setting in shown)]
    heights = [_CURVES_IN, _BARS_IN + _names_height(classes)] if classes else [_CURVES_IN]
    width = max(_WIDTH_IN, _CLASS_IN * len(classes) + 1)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (key, name) in zip(rows[0].subplots(1, 3), _CURVES, strict=True):
        for index, setting in enumerate(shown):
            _draw_curve(axes, setting, key, color=colormaps["tab10"](index))
        axes.set(title=name, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    if classes:
        _draw_classes(rows[1].subplots(), comparison, shown, classes)
    handles, texts = rows[0].axes[0].get_legend_handles_labels()
    columns = legend_columns(texts, width=width, font_size=_LEGEND_FONT, most=min(5, len(shown)))
    title, font = _title(comparison, shown), {"fontsize": _LEGEND_FONT, **LEGEND}
    figure.legend(handles, texts, loc="outside upper center", ncols=columns, title=title, **font)
    return figure


def _title(comparison: Comparison, shown: Sequence[Setting]) -> str | None:
    if len(shown) < 2 and not comparison.has_seeds:
        return None
    parts = ["best first"] if len(shown) > 1 else []
    parts += ["means over seeds ± one standard deviation"] if comparison.has_seeds else []
    parts += [f"{len(shown)} of {len(comparison.settings)} settings"] if len(shown) < len(comparison.settings) else []
    return ", ".join(parts)


def _draw_curve(axes: Axes, setting: Setting, key: str, *, color: tuple[float, float, float, float]) -> None:
    label = literal(shorten(setting.label, _MAX_LABEL)) + (
        f" ({len(setting.counted)} seeds)" if len(setting.counted) > 1 else ""
    )
    points = setting.curve(key)
    steps, means = [step for step, _, _ in points], [mean for _, mean, _ in points]
    is_point = sum(map(math.isfinite, means)) == 1  # no line to be seen, and no band
    marker = "o" if key == MIOU or is_point else None
    axes.plot(steps, means, color=color, label=label, marker=marker, markersize=4, linewidth=1.5)
    if any(spread for _, _, spread in points):
        if is_point:
            axes.errorbar(steps, means, [spread for _, _, spread in points], fmt="none", ecolor=color, capsize=3)
        low, high = [mean - spread for _, mean, spread in points], [mean + spread for _, mean, spread in points]
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def _draw_classes(axes: Axes, comparison: Comparison, shown: Sequence[Setting], classes: Sequence[str]) -> None:
    """Draw a group of bars for each class and for the mean, a star over the best of each where there is one."""
    groups = [*classes, "mIoU"]
    width = 0.8 / len(shown)
    for index, setting in enumerate(shown):
        values = [setting.class_scores.get(name, []) for name in classes] + [setting.scores]
        means = [statistics.fmean(v) if v else 0.0 for v in values]
        places = [group - 0.4 + (index + 0.5) * width for group in range(len(groups))]
        axes.bar(places, means, width, color=colormaps["tab10"](index))
        spread = [(p, m, statistics.stdev(v)) for p, m, v in zip(places, means, values, strict=True) if len(v) > 1]
        if spread:
            x, y, error = zip(*spread, strict=True)
            axes.errorbar(x, y, error, fmt="none", ecolor="black", elinewidth=0.8)
        for group in range(len(groups)):
            winner = comparison.class_winner(classes[group], shown) if group < len(classes) else _winner(comparison)
            if winner is setting:
                top = means[group] + (statistics.stdev(values[group]) if len(values[group]) > 1 else 0.0)
                axes.annotate("*", (places[group], top), ha="center", va="bottom", fontsize=12)
    title = "IoU of each class at the best step"
    if len(shown) > 1:
        title += ", * best beyond noise" if comparison.noise.degrees else ", * best"
    names, (size, rotation) = [literal(shorten(name, _MAX_NAME)) for name in groups], _font(classes)
    align = "right" if rotation < 90 else "center"
    axes.set_xticks(range(len(groups)), names, fontsize=size, rotation=rotation, ha=align)
    axes.set(title=title, xlim=(-0.6, len(groups) - 0.4))
    axes.margins(y=0.1)  # space for the stars
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)


def _winner(comparison: Comparison) -> Setting | None:
    """The setting with the best mIoU; None for a tie, or where the second is within noise."""
    scored = comparison.scored
    return scored[0] if len(scored) > 1 and comparison.lead(scored[0], scored[1]).is_real else None


def _font(classes: Sequence[str]) -> tuple[int, int]:
    """Points and rotation in degrees of the classes' names."""
    return (8, 90) if len(classes) > _MANY_CLASSES else (10, 35)


def _names_height(classes: Sequence[str]) -> float:
    """Inches that the classes' names take below the bars."""
    size, rotation = _font(classes)
    return widest([shorten(name, _MAX_NAME) for name in classes], font_size=size) * math.sin(math.radians(rotation))
