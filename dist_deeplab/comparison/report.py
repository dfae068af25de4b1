"""A comparison as it is printed, kept in files and shown in MLflow."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dist_deeplab.comparison.conclusions import conclusions
from dist_deeplab.comparison.record import IOU, RunRecord
from dist_deeplab.comparison.settings import Comparison, Setting, compare
from dist_deeplab.comparison.table import class_table, duration, mark, number, run_table, score, settings_table
from dist_deeplab.errors import UserError

_COSTS = ("cost/total_s", "cost/device_hours")


def print_report(records: Sequence[RunRecord], console: Console) -> None:
    """Print the tables and the conclusions."""
    comparison = compare(records)
    for table in _tables(comparison):
        console.print(table)
    for line in conclusions(comparison):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _tables(comparison: Comparison) -> list:
    classes = class_table(comparison)
    settings = [settings_table(comparison)] if comparison.has_seeds else []
    return [*settings, run_table(comparison), *([classes] if classes else [])]


def save_figure(records: Sequence[RunRecord], path: Path) -> Path:
    """Write the figure, and return its path.

    Raises:
        UserError: it can't be written there.
    """
    from dist_deeplab.comparison.figure import comparison_figure  # matplotlib takes 0.3 s to import

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        comparison_figure(compare(records)).savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the figure {path}: {error}; choose another place") from None
    return path


def write_report(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Write comparison.png and comparison.csv (a row per run: settings, scores, cost); return the files.

    In the CSV the mean, the standard deviation and the number of seeds of a run's setting are beside its own score.
    """
    comparison = compare(records)
    path = folder / "comparison.csv"
    own = ["status", "best_mIoU", "best_step", "setting_mean_mIoU", "setting_std_mIoU", "setting_seeds"]
    costs = ["train/loss", *_COSTS, "memory/peak_gib", "images_per_s"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *comparison.run_keys, *own, *costs, *(IOU + name for name in comparison.classes)])
        for setting in comparison.settings:
            for run in setting.runs:
                iou = run.class_iou()
                step, miou = run.best or (None, None)
                cells: list[object] = [run.name, *(run.settings.get(key, "") for key in comparison.run_keys)]
                cells += [run.status, miou, step, setting.mean, setting.deviation, len(setting.scores)]
                cells += [run.last("train/loss"), *(run.total(key) for key in costs[1:4]), run.median("images_per_s")]
                writer.writerow([*cells, *(iou.get(name) for name in comparison.classes)])
    return [save_figure(records, folder / "comparison.png"), path]


def summary(records: Sequence[RunRecord]) -> dict[str, float]:
    """Metric points of a sweep as a whole: the best setting's mean score, its lead, and what all runs cost together."""
    comparison = compare(records)
    values = {key: sum(record.total(key) or 0.0 for record in records) for key in _COSTS}
    scored = comparison.scored
    if scored:
        named = {"val/best_mIoU": scored[0].mean, "val/best_mIoU_std": scored[0].deviation}
        if len(scored) > 1:
            lead = comparison.lead(scored[0], scored[1])
            named |= {"val/lead_mIoU": lead.value, "val/lead_mIoU_standard_error": lead.error}
        values |= {key: value for key, value in named.items() if value is not None}
    return values


def markdown(records: Sequence[RunRecord]) -> str:
    """The comparison as Markdown, for the description of a sweep's run in MLflow."""
    comparison = compare(records)
    lines = [f"- {line}" for line in conclusions(comparison)]
    if comparison.has_seeds:
        lines += ["", *_settings_markdown(comparison)]
    head = ["run", *comparison.run_keys, "best mIoU", "at step", "train loss", "time", "device-hours", "status"]
    lines += ["", _row(head), _row(["---"] * len(head))]
    for run in comparison.runs:
        step, miou = run.best or (None, None)
        keys = [run.settings.get(key, "") for key in comparison.run_keys]
        place = [score(miou), "-" if step is None else str(step)]
        lines.append(_row([run.name, *keys, *place, *_cost_cells(Setting("", (run,))), run.status]))
    return "\n".join(lines)


def _settings_markdown(comparison: Comparison) -> list[str]:
    names = comparison.keys or ("setting",)
    head = ["", *names, "seeds", "mean mIoU", "std", "train loss", "time", "device-hours"]
    rows = [_row(head), _row(["---"] * len(head))]
    for setting in comparison.settings:
        keys = [setting.runs[0].settings.get(key, "") for key in comparison.keys] or [setting.label]
        place = mark(comparison, setting).replace("*", "best").replace("~", "within noise")
        scores = [str(len(setting.counted)), score(setting.mean), score(setting.deviation)]
        rows.append(_row([place, *keys, *scores, *_cost_cells(setting)]))
    return rows


def _cost_cells(setting: Setting) -> list[str]:
    return [
        number(setting.mean_of(lambda run: run.last("train/loss")), ".4f"),
        duration(setting.mean_of(lambda run: run.total("cost/total_s"))),
        number(setting.mean_of(lambda run: run.total("cost/device_hours")), ".3g"),
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
