"""`Tracker`: the journal of a run, sent to MLflow by a process of its own.

On the main rank every point is appended to the journal in the run's folder, which is the truth. A separate process
(`tracking/mlflow/uploader.py`) reads that file and sends it to MLflow, so neither a slow nor a dead server, nor
MLflow's import, ever costs training a moment. Other ranks get a tracker that does nothing.

A full disk ends nothing: points wait in memory, and what else is written here is tried again or left out, with one
warning.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import TrainingError, UserError
from dist_deeplab.files import NonEssentialWrites, replace_text
from dist_deeplab.redaction import redact, shown_url
from dist_deeplab.tracking.background_files import BackgroundFiles
from dist_deeplab.tracking.cost import Cost, CostAtStep
from dist_deeplab.tracking.divergence import Divergence
from dist_deeplab.tracking.journal import JOURNAL, Journal
from dist_deeplab.tracking.mlflow.private import remember_store
from dist_deeplab.tracking.mlflow.process import Upload, UploaderProcess
from dist_deeplab.tracking.mlflow.store import default_store
from dist_deeplab.tracking.provenance import host_name, slurm_job
from dist_deeplab.tracking.run_files import write_run_file
from dist_deeplab.tracking.status import RunStatus
from dist_deeplab.tracking.system_metrics import start_system_metrics

log = logging.getLogger(__name__)

_COMPUTED = ("train/", "lr/", "val/")  # follow from seed and step; times and memory differ each time
_BEST = "val/best_mIoU"  # depends on which steps were evaluated, and whose checkpoints could be written

Images = Mapping[str, Path]


@dataclass(frozen=True)
class Reporting:
    """Where and how a run is reported.

    uri: MLflow store, or `none` for no MLflow. experiment: MLflow experiment. system_metrics: record how busy each node
    is. log_model, register_as: log the best checkpoint as a model at the end, and register it. on_event: a shell
    command (see status.py).
    """

    uri: str
    experiment: str
    system_metrics: bool = False
    log_model: bool = False
    register_as: str = ""
    on_event: str = ""


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
        """As `log_files`, for {name of the series: image file}: MLflow shows each series with a slider of steps."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Record facts about the whole run that became known by now; a later value replaces an earlier one."""

    def close(self, status: str) -> None:
        """End the run with MLflow's status FINISHED, FAILED or KILLED (stopped early), and wait for the uploader."""


class JournalTracker(Tracker):
    """The main rank's tracker.

    Args:
        run_dir: the run's folder, which exists.
        world_size: number of processes, for the cost.
        running_s: how long they have been running already.
    """

    def __init__(self, run_dir: Path, world_size: int = 1, *, running_s: float = 0.0) -> None:
        self.run_dir = run_dir
        self.journal = Journal(run_dir / JOURNAL)
        self.uploader: UploaderProcess | None = None
        self.status = RunStatus(run_dir, attempt=self.journal.attempt)
        self._files = BackgroundFiles()
        self._divergence = Divergence()
        self._computed: tuple[str, ...] = _COMPUTED
        self._cost: CostAtStep | None = CostAtStep(Cost(self.journal.points, world_size, running_s=running_s))
        self._describe: Callable[[], None] | None = None
        self._describe_if_possible = NonEssentialWrites("run.json, config.yaml")

    def start(self, **facts: object) -> None:
        """Record that an attempt begins. With another `log_every` than before, means over steps do not compare."""
        if self.journal.periods - {facts.get("log_every")}:
            self._computed = tuple(prefix for prefix in _COMPUTED if prefix != "train/")
        self._append({"status": "RUNNING", **facts, "attempt": self.journal.attempt})
        self.status.begin()

    def describe(self, write: Callable[[], None]) -> None:
        """Call `write`, which describes the run in files, now and at later log lines until the disk has space."""
        self._describe = write
        with self._describe_if_possible():
            write()
            self._describe = None

    def start_uploader(self, upload: Upload) -> None:
        """Start the process that sends the journal to MLflow."""
        self.uploader = UploaderProcess(upload)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker. After a resume the steps since the checkpoint come again; MLflow must see each point once."""
        self.status.at(step)
        self._log_cost(step, values)
        self._record_files(wait=False)
        if not values:
            return
        for key, value in values.items():
            known = self.journal.points.get((key, step))
            if known is not None and key.startswith(self._computed) and key != _BEST:
                self._divergence.compare(key, step, known, value)
        diverged, summary = self._divergence.pop_news()
        watched = self.uploader.watch() if self.uploader else {}
        self._append_points(step, {**values, **diverged, **watched})
        if summary:
            self.log_tags({"diverged": summary})
        if self._describe:
            self.describe(self._describe)

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
        cost = self._cost.pop(is_end=True) if self._cost else None
        if cost:
            self._append_points(*cost)
        self._append({"status": status, "attempt": self.journal.attempt, "note": self.status.end(status)})
        self.journal.close()
        if self.uploader is not None:
            self.uploader.wait(status)

    def _log_cost(self, step: int, values: Mapping[str, float]) -> None:
        if "cost/total_s" in values:  # a sweep's is of its runs
            self._cost = None
        done = self._cost.at(step, is_logged=bool(values)) if self._cost else None
        if done:
            self._append_points(*done)

    def _append(self, record: dict[str, Any]) -> None:
        self.journal.append({"time": round(time.time(), 3), **record})

    def _append_points(self, step: int, values: Mapping[str, float]) -> None:
        now, points = round(time.time(), 3), self.journal.points
        records = []
        for key, value in values.items():
            if math.isfinite(value) and (key, step) not in points:  # NaN is not JSON, nor a point of a curve
                points[key, step] = value
                records.append({"step": step, "time": now, "key": key, "value": value, "attempt": self.journal.attempt})
        if records:
            self.journal.append(*records)

    def _record_files(self, *, wait: bool) -> None:
        for step, files in self._files.finished(wait=wait):
            for path, facts in files:
                self._append({"step": step, "file": str(path.relative_to(self.run_dir)), **facts})


def open_tracker(
    run_dir: Path, *, env: DistEnv, reporting: Reporting, config_yaml: str, run_info: Mapping[str, Any]
) -> Tracker:
    """This rank's tracker, on the main rank with a running uploader; every rank calls it.

    Args:
        run_dir: folder of the run, which exists.
        env: this rank: the main one writes.
        reporting: where the run is reported.
        config_yaml: the resolved configuration, written to `config.yaml`.
        run_info: plain values for `run.json`: name, parameters, tags, and what else `RunFile` has.

    Raises:
        TrainingError: the journal can't be opened or made.
    """
    if reporting.system_metrics:
        env.on_each_node(start_system_metrics, run_dir, host_name())
    running_s = max(0.0, time.time() - psutil.Process().create_time())
    try:
        tracker = env.on_main(lambda: JournalTracker(run_dir, env.world_size, running_s=running_s))
    except OSError as error:
        raise TrainingError(
            f"cannot write to {run_dir / JOURNAL} ({error.strerror or error}), which a run needs; make "
            "room or give permission, then the same command resumes"
        ) from None
    if tracker is None:
        return Tracker()
    attempt, uri = tracker.journal.attempt, reporting.uri

    def describe() -> None:
        replace_text(run_dir / "config.yaml", redact(config_yaml, environ={}))
        write_run_file(run_dir, uri=uri, experiment=reporting.experiment, attempt=attempt, run_info=run_info)

    tracker.describe(describe)
    settings = {} if "children" in run_info else run_info.get("parameters", {})  # a sweep trains nothing itself
    max_steps, log_every = settings.get("max_steps", 0), settings.get("tracking.log_every")
    tracker.status = RunStatus(run_dir, max_steps=max_steps, attempt=attempt, on_event=reporting.on_event)
    job = slurm_job()
    tracker.start(**({"slurm_job": job} if job else {}), **({"log_every": log_every} if log_every else {}))
    if uri != "none":
        _note_store(run_dir, uri)
        wants_model = reporting.log_model or bool(reporting.register_as)
        tracker.start_uploader(
            Upload(run_dir, uri, wants_model, register_as=reporting.register_as, on_event=reporting.on_event)
        )
    return tracker


def _note_store(run_dir: Path, uri: str) -> None:
    """Remember a store that the user has set, and warn of one that does not fit the run."""
    is_set = uri not in (default_store(run_dir.absolute().parent.resolve()), os.environ.get("MLFLOW_TRACKING_URI"))
    if is_set and shown_url(uri) == uri:  # nothing secret in it
        with NonEssentialWrites("the list of known MLflow stores")():
            remember_store(uri)
    if uri.startswith("sqlite") and "SLURM_ARRAY_JOB_ID" in os.environ:
        log.warning(
            "the runs of this array job share one SQLite file, %s: over a network file system and with many nodes set "
            "tracking.uri or MLFLOW_TRACKING_URI to an MLflow server",
            uri,
        )


def resolve_uri(uri: str, output_dir: str) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a SQLite file in the folder of all runs.

    Raises:
        UserError: that file's path has characters that mean something else in a URL.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    folder = Path(output_dir).expanduser().resolve()
    reserved = sorted(set("?#%") & set(str(folder)))
    if not found and reserved:
        raise UserError(
            f"{folder} has {' '.join(reserved)} in it, which an MLflow address cannot hold; choose another output_dir, "
            "set tracking.uri, or tracking.uri=none"
        )
    return found or default_store(folder)
