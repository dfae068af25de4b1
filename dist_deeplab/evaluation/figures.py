"""An evaluation as figures: confusion matrix, IoU bars, and panels image | label | prediction | errors.

All are matplotlib figures, drawn without a display; `render` makes an array of one. Imported where they are drawn:
training need not have loaded matplotlib before its first evaluation. Scores are in 0..1.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.patches import Patch

from dist_deeplab.data.figure_names import LEGEND, legend_columns, literal, shorten, widest
from dist_deeplab.data.voc import PALETTE
from dist_deeplab.evaluation.confusion import Scores
from dist_deeplab.evaluation.evaluator import Evaluation, Panel

DPI = 100
_WRONG, _RIGHT, _VOID = (214, 40, 40), (225, 225, 225), (255, 255, 255)
_WIDTH_IN = 12.0  # of a row of four images
_LEGEND_COLUMNS, _LEGEND_ROWS, _LEGEND_ENTRIES = 8, 6, 24  # at most
_LEGEND_NAME, _LEGEND_FONT = 32, 11  # characters at most; points
_TICK_FONT = 10  # points
_TITLE_IN, _GAP_IN, _LEGEND_ROW_IN = 0.35, 0.03, 0.28


def panel_images(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """{sample key: uint8 [h, w, 3]}, each panel as an image of its own with title and legend, 1200 px wide.

    The same samples at each evaluation of a set, each of the same size: a slider over steps shows them evolving.
    """
    return {
        panel.key: render(panels_figure([panel], class_names, ignore_label=evaluation.ignore_label))
        for panel in evaluation.panels
    }


def render(figure: Figure) -> np.ndarray:
    """A figure as an image, uint8 [h, w, 3] at 100 pixels per inch."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw the matrix with each row as shares of the true class's pixels, of the classes in labels or predictions."""
    shown = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    left_out = f"\n{len(class_names) - len(shown)} of {len(class_names)} classes neither true nor predicted"
    title = "Share of each true class's pixels (%)" + (left_out if len(shown) < len(class_names) else "")
    confusion, class_names = confusion[np.ix_(shown, shown)], [class_names[c] for c in shown.tolist()]
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    num, class_names = len(class_names), [literal(name) for name in class_names]
    side = max(3.5, 0.42 * num) + max(1.5, 0.1 * max(map(len, class_names)))  # inches: cells, and names beside them
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    absent = confusion.sum(1) == 0
    axes.set_xticks(range(num), class_names, rotation=90)
    axes.set_yticks(range(num), [f"{name} (none)" if none else name for name, none in zip(class_names, absent)])
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        text = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
        text.set_in_layout(False)  # hundreds of them; the layout would measure each, several times
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def iou_figure(result: Scores, class_names: Sequence[str]) -> Figure:
    """Draw a bar for each class in the set, in VOC's colours, and the mean as a line."""
    shown = [c for c, iou in enumerate(result.iou.tolist()) if not math.isnan(iou)]
    values = result.iou[shown].tolist()
    names = [class_names[c] for c in shown]
    figure = _figure(7 + max(1.0, widest(names, font_size=_TICK_FONT)), 0.3 * len(shown) + 1.5)
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), values, color=PALETTE[shown] / 255.0, edgecolor="black", linewidth=0.5)
    for row, iou in enumerate(values):
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # the dashed line must not cross it
        axes.text(iou + 0.008, row, f"{iou:.3f}", va="center", fontsize=8, bbox=background)
    axes.axvline(result.miou, color="black", linestyle="--", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [literal(name) for name in names], fontsize=_TICK_FONT)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    absent = f"; {result.num_absent} of {len(class_names)} classes not in this set" if result.num_absent else ""
    axes.set(xlim=(0, 1.08), xlabel="IoU", title=f"mIoU {result.miou:.4f} (dashed){absent}")
    return figure


def trimap_figure(bands: Mapping[int, Scores], result: Scores) -> Figure:
    """Draw mean IoU and pixel accuracy near borders over the width of the band, and of all pixels as lines."""
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    widths = list(bands)
    for name, color, values, level in (
        ("mIoU", "tab:blue", [band.miou for band in bands.values()], result.miou),
        ("pixel accuracy", "tab:orange", [band.pixel_accuracy for band in bands.values()], result.pixel_accuracy),
    ):
        axes.plot(widths, values, "o-", color=color, label=name)
        axes.axhline(level, color=color, linestyle="--", linewidth=1, label=f"{name} of all pixels")
    axes.set_xscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set(xlabel="distance from a border, at most (pixels)", ylabel="score", title="Scores near borders (trimap)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def panels_figure(panels: Sequence[Panel], class_names: Sequence[str], *, ignore_label: int) -> Figure:
    """Draw a row image | label | prediction | errors for each panel, with a legend of the classes shown."""
    class_names = [shorten(name, _LEGEND_NAME) for name in class_names]
    # Of all names, whichever are shown: an image keeps its size whatever is predicted.
    num_columns = legend_columns([*class_names, "wrong"], width=_WIDTH_IN, font_size=_LEGEND_FONT, most=_LEGEND_COLUMNS)
    num_rows = min(_LEGEND_ROWS, math.ceil(min(_LEGEND_ENTRIES, len(class_names) + 3) / num_columns))
    entries = _legend_entries(panels, class_names, ignore_label, num_columns * num_rows)
    width = _WIDTH_IN / 4
    heights = [(width - 2 * _GAP_IN) * panel.label.shape[0] / panel.label.shape[1] + _TITLE_IN for panel in panels]
    height = sum(heights) + _LEGEND_ROW_IN * num_rows + 4 * _GAP_IN
    figure = Figure(figsize=(_WIDTH_IN, height))
    # All in one Axes whose units are inches: one per image, laid out by matplotlib, takes ten times as long.
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    top = 0.0
    for panel, own_height in zip(panels, heights, strict=True):
        images = (panel.image, PALETTE[panel.label], PALETTE[panel.pred], _error_map(panel, ignore_label))
        name = panel.key if len(panel.key) <= 28 else f"...{panel.key[-25:]}"
        score = "" if math.isnan(panel.iou) else f" (IoU {panel.iou:.3f})"
        for column, (image, title) in enumerate(zip(images, (name, "label", f"prediction{score}", "errors"))):
            left = column * width + _GAP_IN
            extent = (left, left + width - 2 * _GAP_IN, top + own_height, top + _TITLE_IN)
            axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
            axes.text(
                (column + 0.5) * width, top + 0.6 * _TITLE_IN, literal(title), ha="center", va="center", fontsize=12
            )
        top += own_height
    axes.set(xlim=(0, _WIDTH_IN), ylim=(height, 0))
    axes.set_axis_off()
    handles = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="black", label=literal(name))
        for name, (red, green, blue) in entries
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=num_columns,
        fontsize=_LEGEND_FONT,
        borderaxespad=0.2,
        **LEGEND,
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _legend_entries(
    panels: Sequence[Panel], class_names: Sequence[str], ignore_label: int, limit: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """Names and colours of the classes with most pixels, in the order of their labels, then void and errors."""
    pixels = sum(np.bincount(mask.ravel(), minlength=256) for panel in panels for mask in (panel.label, panel.pred))
    assert isinstance(pixels, np.ndarray)
    pixels[ignore_label] = 0
    shown = sorted(c for c in np.argsort(-pixels, kind="stable")[: limit - 3].tolist() if pixels[c])
    colors = [(class_names[c], PALETTE[c]) for c in shown] + [("void", PALETTE[ignore_label])]
    return [*((name, (int(r), int(g), int(b))) for name, (r, g, b) in colors), ("wrong", _WRONG), ("right", _RIGHT)]


def _error_map(panel: Panel, ignore_label: int) -> np.ndarray:
    """uint8 [H, W, 3]: wrong pixels red, right ones grey, void white."""
    errors = np.where((panel.label == panel.pred)[..., None], _RIGHT, _WRONG).astype(np.uint8)
    errors[panel.label == ignore_label] = _VOID
    return errors
