"""An evaluation as things to read and look at: metric points, terminal table, and the files of a report."""

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_deeplab.evaluation.confusion import Scores, scores
from dist_deeplab.evaluation.evaluator import Evaluation


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
    from dist_deeplab.evaluation import figures  # matplotlib takes 0.3 s to import

    folder.mkdir(parents=True, exist_ok=True)
    result = scores(evaluation.confusion)
    metrics = folder / "metrics.json"
    metrics.write_text(json.dumps(to_json(evaluation, class_names), indent=1) + "\n", encoding="utf-8")
    drawn = {
        "confusion.png": figures.confusion_figure(evaluation.confusion, class_names),
        "iou.png": figures.iou_figure(result, class_names),
    }
    if evaluation.panels:
        drawn["panels.png"] = figures.panels_figure(
            evaluation.panels, class_names, ignore_label=evaluation.ignore_label
        )
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=figures.DPI)
    return [metrics, *(folder / name for name in drawn)]


def write_series(evaluation: Evaluation, class_names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return {series: picture} of what is worth watching over the steps, after `write_report`; writes the panels."""
    from PIL import Image

    from dist_deeplab.evaluation import figures

    (folder / "panels").mkdir(parents=True, exist_ok=True)
    series = {"iou": folder / "iou.png", "confusion": folder / "confusion.png"}
    for key, picture in figures.panel_pictures(evaluation, class_names).items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", key)
        series[f"panels/{name}"] = folder / "panels" / f"{name}.png"
        Image.fromarray(picture).save(series[f"panels/{name}"])
    return series
