"""A comparison as it is printed, kept in files and shown in MLflow."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dist_deeplab.comparison.record import IOU, RunRecord
from dist_deeplab.comparison.table import class_table, differing_settings, duration, number, rank, run_table, verdict
from dist_deeplab.errors import UserError


def print_report(records: Sequence[RunRecord], console: Console) -> None:
    """Print the tables and the verdict."""
    console.print(run_table(records))
    classes = class_table(records)
    if classes is not None:
        console.print(classes)
    for line in verdict(records):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def save_figure(records: Sequence[RunRecord], path: Path) -> Path:
    """Write the figure, and return its path.

    Raises:
        UserError: it can't be written there.
    """
    from dist_deeplab.comparison.figure import comparison_figure  # matplotlib takes 0.3 s to import

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        comparison_figure(records).savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the figure {path}: {error}; choose another place") from None
    return path


def write_report(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write comparison.png and comparison.csv (a row for each run: settings, scores, cost); return the files."""
    keys, classes = differing_settings(records), dict.fromkeys(name for r in records for name in r.class_iou())
    path = folder / "comparison.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        metrics = ["train/loss", "cost/total_s", "cost/device_hours", "memory/peak_gib"]
        columns = ["run", *keys, "status", "best_mIoU", "best_step", *metrics, "images_per_s"]
        writer.writerow([*columns, *(IOU + name for name in classes)])
        for record in rank(records):
            step, miou = record.best or ("", "")
            iou = record.class_iou()
            row: list[object] = [
                record.name,
                *(record.settings.get(key, "") for key in keys),
                record.status,
                miou,
                step,
            ]
            row += [record.last(key) for key in metrics]
            writer.writerow([*row, record.median("images_per_s"), *(iou.get(name, "") for name in classes)])
    return [save_figure(records, folder / "comparison.png"), path]


def summary(records: Sequence[RunRecord]) -> dict[str, float]:
    """Return metric points of a sweep as a whole: the best score, and what all its runs cost together."""
    best = [record.best[1] for record in records if record.best]
    totals = {key: sum(record.last(key) or 0.0 for record in records) for key in ("cost/total_s", "cost/device_hours")}
    return {**({"val/best_mIoU": max(best)} if best else {}), **totals}


def markdown(records: Sequence[RunRecord]) -> str:
    """Return the comparison as Markdown, for the description of a sweep's run in MLflow."""
    keys = differing_settings(records)
    head = ["run", *keys, "best mIoU", "at step", "train loss", "time", "device-hours", "status"]
    lines = [*(f"- {line}" for line in verdict(records)), "", _row(head), _row(["---"] * len(head))]
    for record in rank(records):
        best = record.best
        lines.append(
            _row(
                [
                    record.name,
                    *(record.settings.get(key, "") for key in keys),
                    number(best[1] if best else None, 100, ".2f"),
                    str(best[0]) if best else "-",
                    number(record.last("train/loss"), 1, ".4f"),
                    duration(record.last("cost/total_s")),
                    number(record.last("cost/device_hours"), 1, ".3g"),
                    record.status,
                ]
            )
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
