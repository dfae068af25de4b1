"""`Tracker`: the journal of a run, sent to MLflow by a process of its own.

On the main rank every point is appended to the journal in the run's folder, which is the truth. A separate process
(`tracking/mlflow/uploader.py`) reads that file and sends it to MLflow, so neither a slow nor a dead server, nor
MLflow's import, ever costs training a moment. Other ranks get a tracker that does nothing.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dist_deeplab.distributed.meter import Cost
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.redaction import redact
from dist_deeplab.tracking.background_files import BackgroundFiles
from dist_deeplab.tracking.divergence import Divergence
from dist_deeplab.tracking.journal import JOURNAL, Journal
from dist_deeplab.tracking.mlflow.process import UploaderProcess
from dist_deeplab.tracking.provenance import host_name, slurm_job
from dist_deeplab.tracking.run_files import write_run_file
from dist_deeplab.tracking.system_metrics import start_system_metrics

log = logging.getLogger(__name__)

_COMPUTED = ("train/", "lr/", "val/")  # follow from seed and step; times and memory differ each time

Images = Mapping[str, Path]


class Tracker:
    """The tracker of ranks that write nothing.

    As a context manager it closes the run on leaving: as failed, unless it was said to be finished or stopped.
    """

    _status = "FAILED"

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(self._status)

    def finished(self) -> None:
        """The run is done."""
        self._status = "FINISHED"

    def stopped(self) -> None:
        """The run is saved and ends early, as it was asked to."""
        self._status = "KILLED"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metric values of a step; NaN and what is recorded already for `(key, step)` are left out."""

    def log_files(self, step: int, write: Callable[[], Iterable[Path]], *, in_background: bool = False) -> None:
        """Call `write`, which makes files under the run's folder and returns them, and hand these to MLflow.

        in_background: call it in a thread, so that the other ranks need not wait; done at the latest at `close`.
        """

    def log_images(self, step: int, write: Callable[[], Images], *, in_background: bool = False) -> None:
        """As `log_files`, for {name of the series: picture}: MLflow's pages show each series with a slider of steps."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Record facts about the whole run that became known by now; a later value replaces an earlier one."""

    def close(self, status: str) -> None:
        """End the run with MLflow's status FINISHED, FAILED or KILLED (stopped early), and wait for the uploader."""


class JournalTracker(Tracker):
    """The main rank's tracker."""

    def __init__(self, run_dir: Path, world_size: int = 1) -> None:
        self.run_dir = run_dir
        self.journal = Journal(run_dir / JOURNAL)
        self.uploader: UploaderProcess | None = None
        self._files = BackgroundFiles()
        self._divergence = Divergence()
        self._cost = Cost(self.journal.points, world_size)

    def start(self, **facts: object) -> None:
        """Record that an attempt begins."""
        self._append({"status": "RUNNING", **facts, "attempt": self.journal.attempt})

    def start_uploader(self) -> None:
        """Start the process that sends the journal to MLflow."""
        self.uploader = UploaderProcess(self.run_dir)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker. After a resume the steps since the checkpoint come again; MLflow must see each point once."""
        self._record_files(wait=False)
        if not values:
            return
        for key, value in values.items():
            known = self.journal.points.get((key, step))
            if known is not None and key.startswith(_COMPUTED):
                self._divergence.compare(key, step, known, value)
        diverged, summary = self._divergence.pop_news()
        cost = {key: value for key, value in self._cost.now().items() if key not in values}  # a sweep's is of its runs
        watched = self.uploader.watch() if self.uploader else {}
        self._append_points(step, {**values, **cost, **diverged, **watched})
        if summary:
            self.log_tags({"diverged": summary})

    def log_files(self, step: int, write: Callable[[], Iterable[Path]], *, in_background: bool = False) -> None:
        """See Tracker."""
        self._files.submit(step, lambda: [(path, {}) for path in write()])
        self._record_files(wait=not in_background)

    def log_images(self, step: int, write: Callable[[], Images], *, in_background: bool = False) -> None:
        """See Tracker."""
        self._files.submit(step, lambda: [(path, {"image": name}) for name, path in write().items()])
        self._record_files(wait=not in_background)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker."""
        self._append({"tags": dict(tags)})

    def close(self, status: str) -> None:
        """See Tracker."""
        self._record_files(wait=True)
        self._append({"status": status, "attempt": self.journal.attempt})
        self.journal.close()
        if self.uploader is not None:
            self.uploader.wait(status)

    def _append(self, record: dict[str, Any]) -> None:
        self.journal.append({"time": round(time.time(), 3), **record})

    def _append_points(self, step: int, values: Mapping[str, float]) -> None:
        now, points = round(time.time(), 3), self.journal.points
        records = []
        for key, value in values.items():
            if math.isfinite(value) and (key, step) not in points:  # NaN is no JSON, and no point of a curve
                points[key, step] = value
                records.append({"step": step, "time": now, "key": key, "value": value, "attempt": self.journal.attempt})
        self.journal.append(*records)

    def _record_files(self, *, wait: bool) -> None:
        for step, files in self._files.finished(wait=wait):
            for path, facts in files:
                self._append({"step": step, "file": str(path.relative_to(self.run_dir)), **facts})


def open_tracker(
    run_dir: Path,
    *,
    env: DistEnv,
    uri: str,
    experiment: str,
    config_yaml: str,
    run_info: Mapping[str, Any],
    system_metrics: bool = False,
) -> Tracker:
    """Return this rank's tracker, on the main rank with a running uploader.

    Args:
        run_dir: folder of the run, which exists.
        env: this rank: the main one writes.
        uri: MLflow tracking URI, or `none` for no MLflow.
        experiment: MLflow experiment.
        config_yaml: the resolved configuration, written to `config.yaml`.
        run_info: plain values for `run.json`: name, parameters, tags, and what else MlflowRun knows.
        system_metrics: whether to record how busy each node is.
    """
    if system_metrics:
        env.on_each_node(start_system_metrics, run_dir, host_name())
    tracker = env.on_main(JournalTracker, run_dir, env.world_size)
    if tracker is None:
        return Tracker()
    (run_dir / "config.yaml").write_text(redact(config_yaml, environ={}), encoding="utf-8")
    write_run_file(run_dir, uri=uri, experiment=experiment, attempt=tracker.journal.attempt, run_info=run_info)
    job = slurm_job()
    tracker.start(**({"slurm_job": job} if job else {}))
    if uri != "none":
        tracker.start_uploader()
    return tracker


def resolve_uri(uri: str, output_dir: str) -> str:
    """Return the configured URI, else MLFLOW_TRACKING_URI, else a SQLite file in the folder of all runs."""
    default = f"sqlite:///{Path(output_dir).expanduser().resolve() / 'mlflow.db'}"
    return uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default
