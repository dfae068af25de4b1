"""`Tracker`: the journal of a run, mirrored to MLflow by a process of its own.

On the main rank every point is appended to `metrics.jsonl` in the run's folder, which is the truth. A separate process
(`runtime/mlflow_mirror.py`) reads that file and sends it to MLflow, so neither a slow nor a dead server, nor MLflow's
import, ever costs training a moment. Other ranks get a tracker that does nothing.
"""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

JOURNAL = "metrics.jsonl"
RUN_FILE = "run.json"
MLFLOW_FILE = "mlflow.json"  # what the mirror remembers: run id, and how much of the journal was sent
_END_WAIT_S = 30.0  # how long the end of a run waits for the mirror to send what is left
_STOP_WAIT_S = 3.0  # where it was stopped or failed: less than the grace time of a preemption


class Tracker:
    """The tracker of ranks that write nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record metric values of a step; NaN and what is recorded already for `(key, step)` are left out."""

    def log_files(self, step: int, write: Callable[[], Iterable[Path]]) -> None:
        """Call `write`, which makes files under the run's folder and returns them, and hand these to MLflow."""

    def close(self, status: str) -> None:
        """End the run with MLflow's status FINISHED, FAILED or KILLED (stopped early), and wait for the mirror."""


class JournalTracker(Tracker):
    """The main rank's tracker."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.recorded, self.attempt = _repair(run_dir / JOURNAL)
        self.file = (run_dir / JOURNAL).open("a", encoding="utf-8")
        self.mirror: subprocess.Popen[bytes] | None = None

    def start_mirror(self) -> None:
        """Start the process that sends the journal to MLflow."""
        self.mirror = _start_mirror(self.run_dir)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker. After a resume the steps since the checkpoint come again; MLflow must see each point once."""
        now = round(time.time(), 3)
        for key, value in values.items():
            if math.isfinite(value) and (key, step) not in self.recorded:  # NaN is no JSON, and no point of a curve
                self.recorded.add((key, step))
                self._append({"step": step, "time": now, "key": key, "value": value, "attempt": self.attempt})
        self.file.flush()

    def log_files(self, step: int, write: Callable[[], Iterable[Path]]) -> None:
        """See Tracker."""
        for path in write():
            self._append({"step": step, "time": round(time.time(), 3), "file": str(path.relative_to(self.run_dir))})
        self.file.flush()

    def close(self, status: str) -> None:
        """See Tracker."""
        self._append({"time": round(time.time(), 3), "status": status, "attempt": self.attempt})
        self.file.close()
        if self.mirror is not None:
            try:
                self.mirror.wait(_END_WAIT_S if status == "FINISHED" else _STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                log.warning(
                    "MLflow has not taken everything yet; process %d goes on trying for 10 minutes, and "
                    "`python -m dist_deeplab.runtime.mlflow_mirror %s` sends the rest at any time",
                    self.mirror.pid,
                    self.run_dir,
                )

    def _append(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")


def open_tracker(
    run_dir: Path, *, is_main: bool, uri: str, experiment: str, config_yaml: str, run_info: Mapping[str, Any]
) -> Tracker:
    """Return this rank's tracker, on the main rank with a running mirror.

    Args:
        run_dir: folder of the run, which exists.
        is_main: whether this rank writes.
        uri: MLflow tracking URI, or `none` for no MLflow.
        experiment: MLflow experiment.
        config_yaml: the resolved configuration, written to `config.yaml`.
        run_info: plain values for `run.json`: name, parameters, tags.
    """
    if not is_main:
        return Tracker()
    tracker = JournalTracker(run_dir)
    (run_dir / "config.yaml").write_text(config_yaml, encoding="utf-8")
    about = {"tracking": {"uri": uri, "experiment": experiment}, "attempt": tracker.attempt, **run_info}
    (run_dir / RUN_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if uri != "none":
        tracker.start_mirror()
    return tracker


def resolve_uri(uri: str, output_dir: str) -> str:
    """Return the configured URI, else MLFLOW_TRACKING_URI, else a SQLite file in the folder of all runs."""
    default = f"sqlite:///{Path(output_dir).expanduser().resolve() / 'mlflow.db'}"
    return uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default


def mlflow_run_id(run_dir: Path) -> str:
    """Return the id of the folder's run in MLflow, or nothing before the mirror has made one."""
    try:
        return json.loads((run_dir / MLFLOW_FILE).read_text(encoding="utf-8"))["run_id"] or ""
    except (OSError, ValueError, KeyError):
        return ""


def git_revision() -> dict[str, str]:
    """Return the revision of the code and whether it was changed, or nothing outside a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        revision, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_revision": revision.strip(), "git_dirty": str(bool(changes.strip())).lower()}


def _start_mirror(run_dir: Path) -> "subprocess.Popen[bytes]":
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "dist_deeplab.runtime.mlflow_mirror", str(run_dir), "--follow", str(os.getpid())]
    # torchrun's variables would make MLflow's libraries believe they are a rank.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    with (logs / "mlflow_mirror.log").open("ab") as output:
        # Its own session: signals meant for the rank must not cut off the last points.
        return subprocess.Popen(command, stdout=output, stderr=output, env=environ, start_new_session=True)


def parse_record(line: bytes) -> dict[str, Any]:
    """Return a journal line's record; an empty one where the line is damaged, e.g. by a power cut."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _repair(path: Path) -> tuple[set[tuple[str, int]], int]:
    """Cut an unfinished last line off the journal; return the points in it and the number of this attempt."""
    recorded: set[tuple[str, int]] = set()
    attempt = 0
    if not path.exists():
        return recorded, attempt
    complete = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            complete += len(line)
            record = parse_record(line)
            attempt = max(attempt, record.get("attempt", 0) + 1)
            if "key" in record:
                recorded.add((record["key"], record["step"]))
    os.truncate(path, complete)
    return recorded, attempt
