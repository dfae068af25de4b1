"""A comparison in sentences: which setting won, for which class, at what cost, and what suggests a reason.

A sentence claims nothing from a difference that is a tie when shown, or within the noise of seeds where that is known.
"""

import statistics
from collections.abc import Callable

from dist_deeplab.comparison.noise import Lead, pooled_noise
from dist_deeplab.comparison.record import MIOU, RunRecord
from dist_deeplab.comparison.settings import Comparison, Setting
from dist_deeplab.comparison.table import duration, score


def conclusions(comparison: Comparison) -> list[str]:
    """Sentences for the terminal and for MLflow's description, the answer first."""
    scored = comparison.scored
    if len(scored) < 2:
        if scored and len(scored[0].scores) > 1:
            return [f"one setting: {_reached(scored[0])}; nothing to compare it with"]
        return ["fewer than two runs have a score: nothing to compare yet"]
    best, second = scored[0], scored[1]
    lead = comparison.lead(best, second)
    lines = [_answer(best, second, lead), *_unfinished_line(comparison)]
    if lead.is_noise:
        near = [setting for setting in scored[1:] if comparison.lead(best, setting).is_noise]
        if len(near) > 1:
            lines.append(f"{len(near)} of the other {len(scored) - 1} settings are within noise of the best")
    elif not lead.is_tie:
        lines += _class_lines(comparison, best, second)
    lines += _cost_line(comparison, best)
    if lead.is_real:
        lines += [*_reason_line(comparison, best), *_peak_line(best)]
    return [*lines, *_seed_line(comparison)]


def _answer(best: Setting, second: Setting, lead: Lead) -> str:
    if lead.is_tie:
        return f"no winner: {best.label} and {second.label} both have mIoU {score(best.mean)}"
    ahead = f"{score(lead.value)} ahead of {second.label}"
    if lead.error is not None:
        ahead += f", standard error {score(lead.error)}"
    if lead.is_noise:
        return f"no winner: {_reached(best)}, is {ahead}: within noise (up to {score(lead.limit)})"
    return f"winner: {_reached(best)}, {ahead}"


def _reached(setting: Setting) -> str:
    """E.g. `power=0.9, mean mIoU 0.5100 (standard deviation 0.0042, 2 seeds)`."""
    if setting.deviation is None:
        return f"{setting.label}, mIoU {score(setting.mean)}"
    spread = f"standard deviation {score(setting.deviation)}, {len(setting.scores)} seeds"
    return f"{setting.label}, mean mIoU {score(setting.mean)} ({spread})"


def _unfinished_line(comparison: Comparison) -> list[str]:
    """Say which runs do not count."""
    left_out = [run.name for setting in comparison.settings for run in setting.runs if run not in setting.counted]
    if not left_out:
        return []
    return [f"not counted in the means, being unfinished or without a score: {', '.join(left_out)}"]


def _class_lines(comparison: Comparison, best: Setting, second: Setting) -> list[str]:
    leads = {name: comparison.class_lead(name, best, second) for name in comparison.classes}
    known = {name: lead for name, lead in leads.items() if lead is not None}
    real = sorted((name for name in known if known[name].is_real), key=lambda name: -known[name].value)
    if not known:
        return []
    beyond = " beyond noise" if comparison.noise.degrees else ""
    if not real:
        return [f"against the second no class alone differs{beyond}"]
    num_better = sum(known[name].value > 0 for name in real)
    extremes = f"most for {real[0]} ({known[real[0]].value:+.4f})"
    if len(real) > 1:
        extremes += f" and least for {real[-1]} ({known[real[-1]].value:+.4f})"
    return [
        f"against the second it gains {extremes}; it is better for {num_better} and worse for "
        f"{len(real) - num_better} of {len(known)} classes{beyond}"
    ]


def _cost_line(comparison: Comparison, best: Setting) -> list[str]:
    def hours(setting: Setting) -> float | None:
        return setting.mean_of(lambda run: run.total("cost/device_hours"))

    own, others = hours(best), [hours(setting) for setting in comparison.scored if setting is not best]
    costs = [value for value in others if value is not None]
    if own is None or len(costs) < len(others):
        return []
    low, high = f"{min(costs):.3g}", f"{max(costs):.3g}"
    span = f"the other took {low}" if len(costs) == 1 else f"the others took {low} to {high}"
    each = " a run" if comparison.has_seeds else ""
    total = sum(run.total("cost/device_hours") or 0.0 for run in comparison.runs)
    time = duration(best.mean_of(lambda run: run.total("cost/total_s")))
    return [
        f"cost of {best.label}: {time}, {own:.3g} device-hours{each}; {span}; "
        f"all {len(comparison.runs)} runs together {total:.3g}"
    ]


_PARTS = {
    "multi_scale.scales": "[]",
    "multi_scale.full_grid": "[]",
    "loss.average": "pixels",
    "loss.class_weights": "[]",
}
"""Keys that decide what a training loss is the sum of, with the values of runs that were begun before they existed."""


def _reason_line(comparison: Comparison, best: Setting) -> list[str]:
    """Say whether the winner also fitted the training data best: fitting and generalising are different reasons.

    Not where the settings' losses are sums of different parts (of one output or several, pixels weighed otherwise), nor
    where the noise of the losses leaves it open.
    """
    read: Callable[[RunRecord], float | None] = lambda run: run.last("train/loss")  # noqa: E731
    losses = {setting.label: setting.values(read) for setting in comparison.scored}
    parts = {tuple(run.settings.get(key, value) for key, value in _PARTS.items()) for run in comparison.runs}
    if len(parts) > 1 or not all(losses.values()):
        return []
    noise, own = pooled_noise(list(losses.values())), losses[best.label]
    leads = [noise.lead(own, other) for label, other in losses.items() if label != best.label]
    mean = f"{statistics.fmean(own):.4f}"
    if all(lead.is_real and lead.value < 0 for lead in leads):
        return [f"why: its training loss is the lowest too ({mean}): it fitted the training data further"]
    lower = sum(lead.is_real and lead.value > 0 for lead in leads)
    if not lower:
        return []
    others = f"{lower} of the other {len(leads)} settings {'has' if lower == 1 else 'have'}"
    if len(leads) == 1:
        others = "the other setting has"
    return [f"why: {others} a lower training loss than its {mean}: that fitted further, this generalised better"]


def _peak_line(best: Setting) -> list[str]:
    """Say where the winner's best score was not its last: it may have won by a lucky evaluation."""
    last = best.mean_of(lambda run: run.last(MIOU))
    if last is None or best.mean is None or score(last) == score(best.mean):
        return []
    below = f"{score(last)}, {score(best.mean - last)} less"
    if len(best.counted) > 1:
        return [f"at their last evaluations its runs had {below} on average than at their best"]
    run = best.counted[0]
    assert run.best is not None
    return [
        f"its best was at step {run.best[0]}; at step {run.curves[MIOU][-1][0]}, its last evaluation, it had {below}"
    ]


def _seed_line(comparison: Comparison) -> list[str]:
    """Caveat for settings that ran with one seed."""
    single = [setting for setting in comparison.scored if len(setting.scores) == 1]
    if not single:
        return []
    if not comparison.noise.degrees:
        return ["each setting ran with one seed: a small lead may be chance (add seed=0,1,2 to the sweep to find out)"]
    have, them = ("has", "it") if len(single) == 1 else ("have", "them")
    return [
        f"{len(single)} of {len(comparison.scored)} settings {have} one seed: the others' spread is assumed for {them}"
    ]
