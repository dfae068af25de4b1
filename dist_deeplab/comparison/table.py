"""A comparison in words and numbers: which run won, for which class, at what cost, and what speaks for a reason."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from dist_deeplab.comparison.record import MIOU, RunRecord
from dist_deeplab.logs import format_duration

_LEFT_OUT = ("name", "output_dir", "resume", "tracking.")  # where a run lies says nothing about what it is
_MAX_COLUMNS = 8
_WINNER = "*"


def rank(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs, best mIoU first, those without a score last."""
    return sorted(records, key=lambda record: -(record.best or (0, -1.0))[1])


def differing_settings(records: Sequence[RunRecord]) -> list[str]:
    """Return the keys of the configuration in which the runs differ, in the configuration's order."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    return [
        key
        for key in keys
        if not key.startswith(_LEFT_OUT) and len({record.settings.get(key) for record in records}) > 1
    ]


def run_table(records: Sequence[RunRecord]) -> Table:
    """Return a row for each run, the best first: settings that differ, scores, what it cost."""
    keys = differing_settings(records)
    table = Table("", "run", *keys, title="runs, best first", title_justify="left")
    for heading in ("best mIoU", "at step", "last mIoU", "train loss", "images/s", "time", "device-hours", "peak GiB"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for place, record in enumerate(rank(records)):
        best = record.best
        table.add_row(
            _WINNER if place == 0 and best else "",
            escape(record.name),
            *(escape(record.settings.get(key, "")) for key in keys),
            number(best[1] if best else None, 100, ".2f"),
            str(best[0]) if best else "-",
            number(record.last("val/mIoU"), 100, ".2f"),
            number(record.last("train/loss"), 1, ".4f"),
            number(record.median("images_per_s"), 1, ".1f"),
            duration(record.last("cost/total_s")),
            number(record.last("cost/device_hours"), 1, ".3g"),
            number(record.last("memory/peak_gib"), 1, ".2f"),
            record.status,
            style="bold" if place == 0 and best else None,
        )
    return table


def class_table(records: Sequence[RunRecord]) -> Table | None:
    """Return a row for each class with every run's IoU (in %), the best marked; None where nothing was scored."""
    scored = [(record, record.class_iou()) for record in rank(records) if record.best][:_MAX_COLUMNS]
    if not scored:
        return None
    table = Table("class", title="class IoU at the best step", title_justify="left")
    for record, _ in scored:
        table.add_column(escape(label(record, records)), justify="right")
    table.add_column("best - worst", justify="right")
    for name in dict.fromkeys(name for _, iou in scored for name in iou):
        values = [iou.get(name) for _, iou in scored]
        known = [value for value in values if value is not None]
        cells = [_marked(value, is_best=value == max(known) > min(known)) for value in values]
        table.add_row(escape(name), *cells, f"{100 * (max(known) - min(known)):.2f}")
    table.add_section()
    table.add_row("mIoU", *(f"{100 * record.best[1]:.2f}" for record, _ in scored if record.best), "", style="bold")
    return table


def verdict(records: Sequence[RunRecord]) -> list[str]:
    """Return sentences that answer which run won, where, at what cost, and what speaks for a reason."""
    scored = [record for record in rank(records) if record.best]
    if len(scored) < 2:
        return ["fewer than two runs have a score: nothing to compare yet"]
    winner, second = scored[0], scored[1]
    assert winner.best is not None and second.best is not None
    ahead = winner.class_iou()
    behind = second.class_iou()
    gains = sorted(((ahead[name] - behind[name], name) for name in ahead.keys() & behind.keys()), reverse=True)
    miou = f"mIoU {100 * winner.best[1]:.2f}"
    if winner.best[1] == second.best[1]:
        return [f"no winner: {label(winner, records)} and {label(second, records)} both have {miou}"]
    lead = _points(winner.best[1], second.best[1])
    lines = [f"winner: {label(winner, records)}, {miou}, {lead} ahead of {label(second, records)}"]
    if gains:
        up, down = gains[0], gains[-1]
        lines.append(
            f"against the second it gains most for {up[1]} ({100 * up[0]:+.2f}) and least for {down[1]} "
            f"({100 * down[0]:+.2f}); it is better for {sum(gain > 0 for gain, _ in gains)} and worse for "
            f"{sum(gain < 0 for gain, _ in gains)} of {len(gains)} classes"
        )
    lines += [*_cost_line(winner, scored), *_reason_line(winner, scored)]
    seeds = {record.settings.get("seed") for record in records}
    if len(seeds) == 1:
        lines.append(
            "each setting ran with one seed: a small lead may be chance (add seed=0,1,2 to the sweep to find out)"
        )
    return lines


def label(record: RunRecord, records: Sequence[RunRecord]) -> str:
    """Return what sets a run apart: `optim.power=0.9`, or its name where that says more."""
    keys = differing_settings(records)
    short = ", ".join(f"{key.rpartition('.')[2]}={record.settings.get(key, '')}" for key in keys)
    same = [
        other for other in records if [other.settings.get(k) for k in keys] == [record.settings.get(k) for k in keys]
    ]
    return short if short and len(short) <= 32 and len(same) == 1 else record.name


def duration(seconds: float | None) -> str:
    """Return e.g. 0:42 or 3:05:00, `-` for None."""
    return "-" if seconds is None else format_duration(seconds)


def _cost_line(winner: RunRecord, scored: Sequence[RunRecord]) -> list[str]:
    cost = winner.last("cost/device_hours")
    others = [record.last("cost/device_hours") for record in scored if record is not winner]
    costs = [value for value in others if value is not None]
    if cost is None or not costs or len(costs) < len(others):
        return []
    span = (
        f"the others took {min(costs):.3g} to {max(costs):.3g}" if len(costs) > 1 else f"the other took {costs[0]:.3g}"
    )
    return [f"cost: {duration(winner.last('cost/total_s'))}, {cost:.3g} device-hours; {span}"]


def _reason_line(winner: RunRecord, scored: Sequence[RunRecord]) -> list[str]:
    """Say whether the winner also fitted the training data best: fitting and generalising are different reasons.

    Not where the runs' losses are sums of different parts, of one output or of several.
    """
    losses = {record.source: record.last("train/loss") for record in scored}
    if None in losses.values():
        return []
    if len({record.settings.get("multi_scale.scales") for record in scored}) > 1:
        return _peak_line(winner)
    own = losses[winner.source]
    assert own is not None
    lower = sum(value is not None and value < own for value in losses.values())
    if lower == 0:
        lines = [f"why: its training loss is the lowest too ({own:.4f}): it fitted the training data further"]
    else:
        lines = [
            f"why: {lower} of {len(scored)} runs have a lower training loss than its {own:.4f}: they fitted further, "
            "it generalised better"
        ]
    return [*lines, *_peak_line(winner)]


def _peak_line(winner: RunRecord) -> list[str]:
    """Say where the winner's best score was not its last: it may have won by a lucky evaluation."""
    assert winner.best is not None
    (step, best), (last_step, last) = winner.best, winner.curves[MIOU][-1]
    if step == last_step:
        return []
    return [
        f"its best was at step {step}; at step {last_step}, its last evaluation, it had {100 * last:.2f}, "
        f"{_points(best, last)} less"
    ]


def _points(first: float, second: float) -> str:
    return f"{100 * (first - second):.2f} points"


def _marked(value: float | None, *, is_best: bool) -> str:
    if value is None:
        return "-"
    return f"[bold]{100 * value:.2f}{_WINNER}[/bold]" if is_best else f"{100 * value:.2f} "


def number(value: float | None, factor: float, form: str) -> str:
    """Return `factor * value` in a format, `-` for None."""
    return "-" if value is None else format(factor * value, form)
