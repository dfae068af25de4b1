"""A comparison as terminal tables: settings, runs, classes. Scores are in 0..1, as in MLflow, JSON and CSV."""

import statistics
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from dist_deeplab.comparison.noise import SHOWN_DIGITS
from dist_deeplab.comparison.record import MIOU, RunRecord
from dist_deeplab.comparison.settings import Comparison, Setting
from dist_deeplab.logs import format_duration

_MAX_COLUMNS = 8
WINNER, NEAR = "*", "~"
_MARKS = f"{WINNER} best mean, {NEAR} within noise of it"
_COST_HEADINGS = ("train loss", "images/s", "time", "device-hours", "peak GiB")


def settings_table(comparison: Comparison) -> Table:
    """A row per setting, best mean first: keys that differ, mean and standard deviation over seeds, mean cost of a run.

    Settings that cannot be told from the best one by their scores are marked as near.
    """
    names = comparison.keys or ("setting",)
    table = Table("", *names, title="settings, best first; means over seeds", title_justify="left")
    for heading in ("seeds", "mIoU", "std", *_COST_HEADINGS):
        table.add_column(heading, justify="right")
    table.add_column("finished", justify="right")
    for setting in comparison.settings:
        is_best = mark(comparison, setting) == WINNER
        labels = [setting.runs[0].settings.get(key, "") for key in comparison.keys] or [setting.label]
        table.add_row(
            mark(comparison, setting),
            *map(escape, labels),
            str(len(setting.counted)),
            score(setting.mean),
            score(setting.deviation),
            *_cost_cells(setting),
            f"{sum(run.status == 'FINISHED' for run in setting.runs)} of {len(setting.runs)}",
            style="bold" if is_best else None,
        )
    if comparison.noise.degrees and len(comparison.scored) > 1:
        table.caption, table.caption_justify = _MARKS, "left"
    return table


def run_table(comparison: Comparison) -> Table:
    """A row per run, those of the best setting first: settings that differ, scores, what it cost."""
    title = "runs, by setting" if comparison.has_seeds else "runs, best first"
    table = Table("", "run", *comparison.run_keys, title=title, title_justify="left")
    for heading in ("best mIoU", "at step", "last mIoU", *_COST_HEADINGS):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for setting in comparison.settings:
        if comparison.has_seeds:
            table.add_section()
        for run in setting.runs:
            own_mark = "" if comparison.has_seeds else mark(comparison, setting)
            step, miou = run.best or (None, None)
            table.add_row(
                own_mark,
                escape(run.name),
                *(escape(run.settings.get(key, "")) for key in comparison.run_keys),
                score(miou),
                "-" if step is None else str(step),
                score(run.last(MIOU)),
                *_cost_cells(Setting("", (run,))),
                run.status,
                style="bold" if own_mark == WINNER else None,
            )
    return table


def class_table(comparison: Comparison) -> Table | None:
    """A row per class with every setting's mean IoU, the best marked where it is one; None where nothing was scored."""
    shown = comparison.scored[:_MAX_COLUMNS]
    if not shown:
        return None
    title = "class IoU at the best step" + (", means over seeds" if comparison.has_seeds else "")
    if len(shown) < len(comparison.scored):
        title += f"; the best {len(shown)} of {len(comparison.scored)} settings"
    table = Table("class", title=title, title_justify="left", caption_justify="left")
    for setting in shown:
        table.add_column(escape(setting.label), justify="right")
    if len(shown) > 1:
        table.add_column("best - worst", justify="right")
    for name in comparison.classes:
        means = [statistics.fmean(s.class_scores[name]) if name in s.class_scores else None for s in shown]
        known = [mean for mean in means if mean is not None]
        winner = comparison.class_winner(name, shown)
        cells = [_marked(mean, is_best=setting is winner) for mean, setting in zip(means, shown, strict=True)]
        spread = [score(max(known) - min(known) if known else None)] if len(shown) > 1 else []
        table.add_row(escape(name), *cells, *spread)
    table.add_section()
    table.add_row("mIoU", *(score(setting.mean) + " " for setting in shown), style="bold")
    table.caption = absent_classes(comparison.runs, len(comparison.classes)) or None
    return table


def absent_classes(runs: Sequence[RunRecord], num_scored: int) -> str:
    """How many of the configured classes no run has a score of, as a sentence; empty if there are none."""
    configured = max(
        (int(text) for run in runs if (text := run.settings.get("data.num_classes", "")).isdigit()), default=0
    )
    absent = configured - num_scored
    have = "has" if absent == 1 else "have"
    return f"{absent} of {configured} classes {have} no pixel in the validation set" if absent > 0 else ""


def mark(comparison: Comparison, setting: Setting) -> str:
    """Mark of a setting: the best, within noise of it, or neither. With one setting, or a tie, none is the best."""
    scored = comparison.scored
    if len(scored) < 2 or setting not in scored:
        return ""
    best = scored[0]
    if setting is not best:
        return NEAR if comparison.lead(best, setting).is_noise else ""
    return "" if comparison.lead(best, scored[1]).is_tie else WINNER


def score(value: float | None) -> str:
    """A score in 0..1, `-` for None."""
    return number(value, f".{SHOWN_DIGITS}f")


def number(value: float | None, form: str) -> str:
    """A number in a format, `-` for None."""
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """E.g. 0:42 or 3:05:00, `-` for None."""
    return "-" if seconds is None else format_duration(seconds)


def _cost_cells(setting: Setting) -> list[str]:
    return [
        number(setting.mean_of(lambda run: run.last("train/loss")), ".4f"),
        number(setting.mean_of(lambda run: run.median("images_per_s")), ".1f"),
        duration(setting.mean_of(lambda run: run.total("cost/total_s"))),
        number(setting.mean_of(lambda run: run.total("cost/device_hours")), ".3g"),
        number(setting.mean_of(lambda run: run.total("memory/peak_gib")), ".2f"),
    ]


def _marked(mean: float | None, *, is_best: bool) -> str:
    if mean is None:
        return "-"
    return f"[bold]{score(mean)}{WINNER}[/bold]" if is_best else f"{score(mean)} "
