"""An evaluation to read: metric points, terminal table, and the files of a report. All scores are in 0..1."""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_deeplab.evaluation.accumulator import TRIMAP_WIDTHS
from dist_deeplab.evaluation.confusion import Scores, scores
from dist_deeplab.evaluation.evaluator import Evaluation, Panel
from dist_deeplab.logs import format_names

_NOT_IN_A_METRIC = r"[^\w.\- :/]"
_MAX_NAMES = 20  # of absent classes


def metric_values(result: Scores, class_names: Sequence[str], *, group: str = "val") -> dict[str, float]:
    """The scores as metric points: `val/mIoU`, `val/pixel_accuracy`, `val/iou/<class>` ...

    Classes without ground truth have no point. A character that MLflow does not allow in a metric's name (ADE20K has
    `door;double door`) becomes an underscore; where two classes would then have the same name, the label follows.
    """
    values = {
        f"{group}/mIoU": result.miou,
        f"{group}/pixel_accuracy": result.pixel_accuracy,
        f"{group}/mean_accuracy": result.mean_accuracy,
        f"{group}/fwIoU": result.fwiou,
    }
    for number, (name, iou) in enumerate(zip(class_names, result.iou.tolist(), strict=True)):
        if not math.isnan(iou):
            key = f"{group}/iou/{re.sub(_NOT_IN_A_METRIC, '_', name)}"
            values[f"{key}_{number}" if key in values else key] = iou
    return values


def describe(result: Scores, class_names: Sequence[str], *, per_class: bool = True, notes: Sequence[str] = ()) -> str:
    """The scores as text for the terminal and log files: the mean, and with `per_class` a table below it."""
    mean = f"mIoU {_score(result.miou)}"
    if per_class:
        return f"{mean}\n{render(iou_table(result, class_names, notes=notes))}"
    return "\n".join([mean, *_remarks(result, class_names, short=True), *notes])


def iou_table(result: Scores, class_names: Sequence[str], *, notes: Sequence[str] = ()) -> Table:
    """Terminal table: IoU of the classes in the set, with bars, then the means; below it absent classes and notes."""
    table = Table("class", "IoU", "", caption_justify="left")
    for name, iou in zip(class_names, result.iou.tolist(), strict=True):
        if not math.isnan(iou):
            table.add_row(name, _score(iou), _bar(iou))
    table.add_section()
    table.add_row("mIoU", _score(result.miou), _bar(result.miou), style="bold")
    table.add_row("pixel accuracy", _score(result.pixel_accuracy), "")
    table.add_row("mean accuracy", _score(result.mean_accuracy), "")
    table.add_row("frequency-weighted IoU", _score(result.fwiou), "")
    table.caption = "\n".join([*_remarks(result, class_names), *notes]) or None
    return table


def _remarks(result: Scores, class_names: Sequence[str], *, short: bool = False) -> list[str]:
    """Sentences about classes without any pixel in the set; `short`: only one that questions the score."""
    absent = [name for name, iou in zip(class_names, result.iou.tolist(), strict=True) if math.isnan(iou)]
    remarks = []
    if absent and not short:
        names = format_names(absent[:_MAX_NAMES]) + (", ..." if len(absent) > _MAX_NAMES else "")
        have = "has" if len(absent) == 1 else "have"
        remarks.append(f"{len(absent)} of {len(class_names)} classes {have} no pixel in this set, left out: {names}")
    if len(absent) == len(class_names) - 1 > 0:
        only = next(name for name, iou in zip(class_names, result.iou.tolist(), strict=True) if not math.isnan(iou))
        remarks.append(
            f"WARNING: every labelled pixel of this set is {only!r}, so a score says nothing: are pixels of another "
            "class marked with the void label (masks of 0 and 255)?"
        )
    return remarks


def _score(value: float) -> str:
    return f"{value:.4f}"


def _bar(value: float) -> str:
    return "█" * round(30 * value)


def render(table: Table) -> str:
    """A table as plain text, for terminals and log files alike."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def trimap_scores(evaluation: Evaluation) -> dict[int, Scores]:
    """{w: scores of the pixels up to w pixels from a border}, without widths that have no valid pixel."""
    if evaluation.trimap is None:
        return {}
    bands = zip(TRIMAP_WIDTHS, evaluation.trimap, strict=True)
    return {width: scores(confusion) for width, confusion in bands if confusion.any()}


@dataclass(frozen=True)
class Report:
    """An evaluation and what its report says beside the scores.

    class_names: in the order of the labels. about: plain values, first in metrics.json. best, worst: panels for
    best.png and worst.png.
    """

    evaluation: Evaluation
    class_names: Sequence[str]
    about: Mapping[str, Any] = field(default_factory=dict)
    best: Sequence[Panel] = ()
    worst: Sequence[Panel] = ()

    def to_json(self) -> dict[str, Any]:
        """`about`, scores and confusion matrix as plain values; a class without ground truth has null."""
        result = scores(self.evaluation.confusion)
        values = zip(self.class_names, result.iou.tolist(), strict=True)
        iou = {name: None if math.isnan(x) else x for name, x in values}
        return dict(self.about) | {
            "num_images": self.evaluation.num_images,
            "mIoU": result.miou,
            "pixel_accuracy": result.pixel_accuracy,
            "mean_accuracy": result.mean_accuracy,
            "fwIoU": result.fwiou,
            "iou": iou,
            "absent_classes": [name for name, value in iou.items() if value is None],
            "trimap_mIoU": {str(width): band.miou for width, band in trimap_scores(self.evaluation).items()},
            "confusion": self.evaluation.confusion.tolist(),
        }


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the numbers and the figures; return the files."""
    return write_numbers(report, folder) + write_figures(report, folder)


def write_numbers(report: Report, folder: Path) -> list[Path]:
    """Write metrics.json, classes.csv and images.csv, in milliseconds; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "metrics.json", folder / "classes.csv", folder / "images.csv"]
    files[0].write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    _write_csv(files[1], ["class", "iou", "accuracy", "label_pixels", "predicted_pixels"], _class_rows(report))
    _write_csv(files[2], ["key", "iou"], [[image.key, _cell(image.miou)] for image in report.evaluation.images])
    return files


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Draw confusion.png, iou.png, trimap.png and the panels that there are, in a second or two; return the files."""
    from dist_deeplab.evaluation import figures  # matplotlib takes 0.3 s to import

    evaluation, class_names = report.evaluation, report.class_names
    result = scores(evaluation.confusion)
    drawn = {
        "confusion.png": figures.confusion_figure(evaluation.confusion, class_names),
        "iou.png": figures.iou_figure(result, class_names),
    }
    if evaluation.trimap is not None:
        drawn["trimap.png"] = figures.trimap_figure(trimap_scores(evaluation), result)
    for name, panels in (("panels.png", evaluation.panels), ("best.png", report.best), ("worst.png", report.worst)):
        if panels:
            drawn[name] = figures.panels_figure(panels, class_names, ignore_label=evaluation.ignore_label)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=figures.DPI)
    return [folder / name for name in drawn]


def write_series(report: Report, folder: Path) -> dict[str, Path]:
    """{series: image file} of what is worth watching over the steps, after `write_figures`; writes the panels."""
    from PIL import Image

    from dist_deeplab.evaluation import figures

    (folder / "panels").mkdir(parents=True, exist_ok=True)
    series = {"iou": folder / "iou.png", "confusion": folder / "confusion.png"}
    for key, image in figures.panel_images(report.evaluation, report.class_names).items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", key)
        series[f"panels/{name}"] = folder / "panels" / f"{name}.png"
        Image.fromarray(image).save(series[f"panels/{name}"])
    return series


def _class_rows(report: Report) -> list[list[Any]]:
    confusion, result = report.evaluation.confusion, scores(report.evaluation.confusion)
    in_label, in_pred = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    rows = []
    for c, (name, iou) in enumerate(zip(report.class_names, result.iou.tolist(), strict=True)):
        accuracy = confusion[c, c] / in_label[c] if in_label[c] else math.nan
        rows.append([name, _cell(iou), _cell(accuracy), in_label[c], in_pred[c]])
    return rows


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
