"""Runs grouped by setting: runs that differ in seed alone are one setting, with a mean and a standard deviation."""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from dist_deeplab.comparison.noise import Lead, Noise, pooled_noise
from dist_deeplab.comparison.record import RunRecord
from dist_deeplab.config import AFFECTS

_MAX_LABEL = 32  # characters


@dataclass(frozen=True)
class Setting:
    """Runs of one setting, in the order of their seeds, and what to call it."""

    label: str
    runs: tuple[RunRecord, ...]

    @cached_property
    def counted(self) -> tuple[RunRecord, ...]:
        """Runs that its means are of: those with a score that are finished, or if there are none, all with a score.

        A run that was cut short has a lower score because of that; the mean would mix this with the seeds' effect.
        """
        scored = tuple(run for run in self.runs if run.best)
        return tuple(run for run in scored if run.status == "FINISHED") or scored

    @cached_property
    def scores(self) -> list[float]:
        """Best mIoU of each counted run, 0..1."""
        return [run.best[1] for run in self.counted if run.best]

    @cached_property
    def mean(self) -> float | None:
        """Mean of the scores, None where nothing was scored."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the scores; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @cached_property
    def class_scores(self) -> dict[str, list[float]]:
        """{class: IoU of each counted run, at the step of its best mIoU}."""
        found: dict[str, list[float]] = {}
        for run in self.counted:
            for name, iou in run.class_iou().items():
                found.setdefault(name, []).append(iou)
        return found

    def values(self, read: Callable[[RunRecord], float | None]) -> list[float]:
        """What `read` finds in the counted runs (in all runs where nothing was scored), without None."""
        return [value for value in map(read, self.counted or self.runs) if value is not None]

    def mean_of(self, read: Callable[[RunRecord], float | None]) -> float | None:
        """Mean of `values`, None where there are none."""
        found = self.values(read)
        return statistics.fmean(found) if found else None

    def curve(self, key: str) -> list[tuple[int, float, float]]:
        """(step, mean, standard deviation) over the counted runs, at the steps that all of them have; 0 for one run."""
        curves = [dict(run.curves[key]) for run in self.counted or self.runs if key in run.curves]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        columns = [(step, [curve[step] for curve in curves]) for step in steps]
        return [(step, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for step, v in columns]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: their settings, best mean first, those without a score last.

    run_keys: keys of the configuration in which runs differ, in its order; keys: the same without the seed.
    """

    settings: tuple[Setting, ...]
    run_keys: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys in which settings differ."""
        return tuple(key for key in self.run_keys if key != "seed" or not self.has_seeds)

    @property
    def runs(self) -> list[RunRecord]:
        """All runs, those of the best setting first."""
        return [run for setting in self.settings for run in setting.runs]

    @property
    def scored(self) -> list[Setting]:
        """Settings with a score."""
        return [setting for setting in self.settings if setting.scores]

    @property
    def has_seeds(self) -> bool:
        """Whether a setting ran with several seeds."""
        return any(len(setting.runs) > 1 for setting in self.settings)

    @cached_property
    def classes(self) -> list[str]:
        """Classes that have a score in any run, in the order of their labels."""
        return list(dict.fromkeys(name for setting in self.scored for name in setting.class_scores))

    @cached_property
    def noise(self) -> Noise:
        """Noise of the mIoU."""
        return pooled_noise([setting.scores for setting in self.settings])

    def lead(self, first: Setting, second: Setting) -> Lead:
        """How far one setting's mIoU is ahead of another's."""
        return self.noise.lead(first.scores, second.scores)

    def class_lead(self, name: str, first: Setting, second: Setting) -> Lead | None:
        """The same for a class; None where one of them has no score of it."""
        own, other = first.class_scores.get(name), second.class_scores.get(name)
        return self._class_noise(name).lead(own, other) if own and other else None

    def class_winner(self, name: str, among: Sequence[Setting]) -> Setting | None:
        """The setting with the best mean IoU of a class; None for a tie, or where the second is within noise."""
        known = sorted(
            (setting for setting in among if name in setting.class_scores),
            key=lambda setting: -statistics.fmean(setting.class_scores[name]),
        )
        if len(known) < 2:
            return None
        lead = self.class_lead(name, known[0], known[1])
        return known[0] if lead and lead.is_real else None

    def _class_noise(self, name: str) -> Noise:
        return pooled_noise([setting.class_scores.get(name, []) for setting in self.settings])


def compare(records: Sequence[RunRecord]) -> Comparison:
    """Group runs by setting and rank the settings."""
    run_keys = differing_settings(records)
    keys = [key for key in run_keys if key != "seed"]
    groups: dict[tuple[str | None, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(tuple(record.settings.get(key) for key in keys), []).append(record)
    members: list[tuple[RunRecord, ...]] = []
    for runs in groups.values():
        seeds = [run.settings.get("seed") for run in runs]
        if len(set(seeds)) == len(seeds):
            members.append(tuple(sorted(runs, key=_by_seed)))
        else:  # one seed twice: something that no key names sets these runs apart, e.g. the code
            members += [(run,) for run in runs]
    shorts = [_short_label(runs[0], keys) for runs in members]
    settings = [
        Setting(short if 0 < len(short) <= _MAX_LABEL and shorts.count(short) == 1 else _name(runs), runs)
        for short, runs in zip(shorts, members, strict=True)
    ]
    ranked = sorted(settings, key=lambda setting: -1.0 if setting.mean is None else setting.mean, reverse=True)
    return Comparison(tuple(ranked), tuple(run_keys))


def differing_settings(records: Sequence[RunRecord]) -> list[str]:
    """Keys in which the runs differ, in the configuration's order, without those that affect nothing (a run's name)."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    affecting = [key for key in keys if key not in AFFECTS or AFFECTS[key].what != "nothing"]
    return [key for key in affecting if len({record.settings.get(key) for record in records}) > 1]


def _by_seed(run: RunRecord) -> tuple[int, str]:
    seed = run.settings.get("seed", "")
    return len(seed), seed


def _short_label(run: RunRecord, keys: Sequence[str]) -> str:
    """E.g. `power=0.9, lr=0.1`."""
    return ", ".join(f"{key.rpartition('.')[2]}={run.settings.get(key, '')}" for key in keys)


def _name(runs: Sequence[RunRecord]) -> str:
    """Name of a run, or what the names of several have in common once the seed is taken out."""
    if len(runs) == 1:
        return runs[0].name
    names = {re.sub(r"(^|-)seed_[^-]*", "", run.name) or run.name for run in runs}
    return names.pop() if len(names) == 1 else f"{runs[0].name} and {len(runs) - 1} more"
