"""`RunRecord`: what a comparison needs of one run, whether it comes from its folder or from MLflow."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from dist_deeplab.config import RENAMED
from dist_deeplab.tracking.journal import JOURNAL, read_records
from dist_deeplab.tracking.run_files import RUN_FILE, known_run_file, read_run_file

Curve = list[tuple[int, float]]
MIOU, IOU = "val/mIoU", "val/iou/"


@dataclass(frozen=True)
class RunRecord:
    """One run.

    settings: the resolved configuration, {"optim.lr": "0.001"}. curves: {metric: [(step, value)] in order of steps}.
    status: MLflow's word, RUNNING, FINISHED, FAILED or KILLED. source: its folder, or its id in MLflow.
    """

    name: str
    source: str
    status: str
    settings: dict[str, str]
    curves: dict[str, Curve]
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best mIoU (the first, where two are equal), whose weights are `best.pt`."""
        curve = self.curves.get(MIOU, [])
        return max(curve, key=lambda point: point[1]) if curve else None

    def class_iou(self) -> dict[str, float]:
        """{class: IoU} at the step of the best mIoU."""
        if self.best is None:
            return {}
        at = {key: dict(curve).get(self.best[0]) for key, curve in self.curves.items() if key.startswith(IOU)}
        return {key.removeprefix(IOU): value for key, value in at.items() if value is not None}

    def last(self, key: str) -> float | None:
        """Last value of a metric, or None where there is none."""
        curve = self.curves.get(key)
        return curve[-1][1] if curve else None

    def total(self, key: str) -> float | None:
        """Largest value of a metric that only grows, such as cost, or None where there is none."""
        curve = self.curves.get(key)
        return max(value for _, value in curve) if curve else None

    def median(self, key: str) -> float | None:
        """Median of a metric over the steps: a rate without the slow first step."""
        curve = self.curves.get(key)
        return statistics.median(value for _, value in curve) if curve else None


def read_folder(folder: Path) -> RunRecord:
    """Record of a run's folder, from `run.json` and the journal alone.

    Raises:
        UserError: not a run's folder, or `run.json` is damaged.
    """
    about = read_run_file(folder)
    curves: dict[str, dict[int, float]] = {}
    status = "RUNNING"
    for record, _ in read_records(folder / JOURNAL):
        status = record.get("status", status)
        if "key" in record:
            curves.setdefault(record["key"], {}).setdefault(record["step"], record["value"])
    return RunRecord(
        name=about.name or folder.name,
        source=str(folder),
        status=status,
        settings={RENAMED.get(key, key): str(value) for key, value in about.parameters.items()},
        curves={key: sorted(points.items()) for key, points in curves.items()},
        tags={key: str(value) for key, value in about.tags.items()},
    )


def children(folder: Path) -> list[Path] | None:
    """Folders of a sweep's runs that have begun, or None for a folder that is not a sweep's."""
    names = known_run_file(folder).children
    return None if names is None else [path for name in names if ((path := folder.parent / name) / RUN_FILE).exists()]
