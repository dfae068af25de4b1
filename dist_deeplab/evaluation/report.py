"""An evaluation as things to read and look at: terminal table, metrics.json, figures."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_deeplab.data.voc import PALETTE
from dist_deeplab.evaluation.confusion import Scores, scores
from dist_deeplab.evaluation.evaluator import Evaluation, Panel

_WRONG, _RIGHT, _VOID = (214, 40, 40), (225, 225, 225), (255, 255, 255)


def metric_values(result: Scores, class_names: Sequence[str]) -> dict[str, float]:
    """Return the scores as metric points: `val/mIoU`, `val/pixel_accuracy`, `val/iou/<class>` ...

    Classes without ground truth have no point.
    """
    values = {
        "val/mIoU": result.miou,
        "val/pixel_accuracy": result.pixel_accuracy,
        "val/mean_accuracy": result.mean_accuracy,
    }
    for name, iou in zip(class_names, result.iou.tolist(), strict=True):
        if not math.isnan(iou):
            values[f"val/iou/{name}"] = iou
    return values


def iou_table(result: Scores, class_names: Sequence[str]) -> Table:
    """Return the per-class IoU as a terminal table with bars, the mean last."""
    table = Table("class", "IoU", "")
    for name, iou in zip(class_names, result.iou.tolist(), strict=True):
        if math.isnan(iou):
            table.add_row(name, "-", "not in this set", style="dim")
        else:
            table.add_row(name, f"{100 * iou:.2f}", "█" * round(30 * iou))
    table.add_section()
    table.add_row("mIoU", f"{100 * result.miou:.2f}", "█" * round(30 * result.miou), style="bold")
    table.add_row("pixel accuracy", f"{100 * result.pixel_accuracy:.2f}", "")
    table.add_row("mean accuracy", f"{100 * result.mean_accuracy:.2f}", "")
    if result.num_absent:
        table.caption = f"{result.num_absent} classes have no pixel in this set and are left out of the means"
    return table


def render(table: Table) -> str:
    """Return a table as plain text, for terminals and log files alike."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def to_json(evaluation: Evaluation, class_names: Sequence[str]) -> dict[str, Any]:
    """Return scores and confusion matrix as plain values; a class without ground truth has null."""
    result = scores(evaluation.confusion)
    return {
        "num_images": evaluation.num_images,
        "mIoU": result.miou,
        "pixel_accuracy": result.pixel_accuracy,
        "mean_accuracy": result.mean_accuracy,
        "iou": {
            name: None if math.isnan(iou) else iou for name, iou in zip(class_names, result.iou.tolist(), strict=True)
        },
        "confusion": evaluation.confusion.tolist(),
    }


def write_report(evaluation: Evaluation, class_names: Sequence[str], folder: Path) -> list[Path]:
    """Write metrics.json, confusion.png, iou.png and, where there are panels, panels.png; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    result = scores(evaluation.confusion)
    metrics = folder / "metrics.json"
    metrics.write_text(json.dumps(to_json(evaluation, class_names), indent=1) + "\n", encoding="utf-8")
    figures = {
        "confusion.png": _confusion_figure(evaluation.confusion, class_names),
        "iou.png": _iou_figure(result, class_names),
    }
    if evaluation.panels:
        figures["panels.png"] = _panels_figure(evaluation, class_names)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=100)
    return [metrics, *(folder / name for name in figures)]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def _confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Any:
    """Draw the matrix with each row as shares of the true class's pixels."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    num = len(class_names)
    side = max(5.0, 0.42 * num + 2)
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="Share of each true class's pixels (%)")
    axes.set_xticks(range(num), class_names, rotation=90)
    axes.set_yticks(range(num), class_names)
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _iou_figure(result: Scores, class_names: Sequence[str]) -> Any:
    """Draw a bar for each class, in VOC's colours, and the mean as a line."""
    num = len(class_names)
    figure = _figure(8, 0.3 * num + 1.5)
    axes = figure.add_subplot()
    values = np.nan_to_num(100 * result.iou)
    axes.barh(range(num), values, color=PALETTE[:num] / 255.0, edgecolor="black", linewidth=0.5)
    for row, iou in enumerate(result.iou.tolist()):
        text = "not in this set" if math.isnan(iou) else f"{100 * iou:.1f}"
        axes.text(values[row] + 0.8, row, text, va="center", fontsize=8)
    axes.axvline(100 * result.miou, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(num), class_names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 108), xlabel="IoU (%)", title=f"mIoU {100 * result.miou:.2f} (dashed)")
    return figure


def _panels_figure(evaluation: Evaluation, class_names: Sequence[str]) -> Any:
    """Draw a row image | label | prediction | errors for each panel, with a legend of the classes shown."""
    from matplotlib.patches import Patch

    panels = evaluation.panels
    figure = _figure(12, 2.9 * len(panels) + 0.8)
    grid = figure.subplots(len(panels), 4, squeeze=False)
    shown: set[int] = set()
    for axes, panel in zip(grid, panels, strict=True):
        pictures = (panel.image, PALETTE[panel.label], PALETTE[panel.pred], _error_map(panel, evaluation.ignore_label))
        shown |= set(np.unique(panel.label).tolist()) | set(np.unique(panel.pred).tolist())
        for ax, picture, title in zip(axes, pictures, (panel.key, "label", "prediction", "errors"), strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(title, fontsize=9)
            ax.set_axis_off()
    colors = {class_names[c]: tuple(PALETTE[c]) for c in sorted(shown - {evaluation.ignore_label})}
    colors |= {"void": tuple(PALETTE[evaluation.ignore_label]), "wrong": _WRONG, "right": _RIGHT}
    handles = [
        Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="black", label=name)
        for name, (red, green, blue) in colors.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8)
    return figure


def _error_map(panel: Panel, ignore_label: int) -> np.ndarray:
    """Return uint8 [H, W, 3]: wrong pixels red, right ones grey, void white."""
    picture = np.where((panel.label == panel.pred)[..., None], _RIGHT, _WRONG).astype(np.uint8)
    picture[panel.label == ignore_label] = _VOID
    return picture
