"""Results that are found after a training has ended, e.g. by `evaluate`: into its journal, and on to MLflow."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from dist_deeplab.command_line import command_name
from dist_deeplab.tracking.journal import JOURNAL, Journal
from dist_deeplab.tracking.run_files import RUN_FILE

log = logging.getLogger(__name__)

_SEND_S = 120.0  # what is not sent by then stays in the journal


def add_to_run(run_dir: Path, step: int, values: Mapping[str, float], folder: Path) -> None:
    """Append points and files to a finished run's journal and send them to its MLflow run.

    The run's status and end time stay as they are. A folder that is no run's, and one in which a training goes on,
    are left alone; the latter with a warning.

    Args:
        run_dir: the run's folder.
        step: the step that the results are of.
        values: {key: value}; NaN is left out, and so is what the journal holds already.
        folder: of files to send too; left out if it is not inside `run_dir`.
    """
    if not (run_dir / RUN_FILE).is_file():
        return
    lock = FileLock(run_dir / "run.lock")
    try:
        with lock.acquire(timeout=0):
            _append(run_dir, step, values, folder)
    except Timeout:
        log.warning("a training goes on in %s: these results were not added to it", run_dir)
        return
    except OSError as error:
        log.warning("these results could not be added to %s: %s", run_dir, error.strerror)
        return
    uri = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))["tracking"]["uri"]
    if uri != "none":
        _send(run_dir)


def _append(run_dir: Path, step: int, values: Mapping[str, float], folder: Path) -> None:
    journal = Journal(run_dir / JOURNAL)
    common = {"step": step, "time": round(time.time(), 3), "late": True}
    attempt = max(0, journal.attempt - 1)  # of the training that these belong to
    points = [
        {**common, "key": key, "value": value, "attempt": attempt}
        for key, value in values.items()
        if math.isfinite(value) and journal.points.get((key, step)) != value
    ]
    root, folder = run_dir.resolve(), folder.resolve()
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_relative_to(root) else []
    journal.append(*points, *({**common, "file": str(file.relative_to(root))} for file in files))
    journal.close()


def _send(run_dir: Path) -> None:
    command = [sys.executable, "-m", "dist_deeplab.tracking.mlflow.uploader", str(run_dir)]
    # torchrun's variables would make MLflow's libraries believe they are a rank.
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    remedy = f"`{command_name('sync-mlflow')} {run_dir}` sends the scores later"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SEND_S, env=environ)
    except subprocess.TimeoutExpired:
        log.warning("MLflow did not answer in %.0f s; %s", _SEND_S, remedy)
        return
    if done.returncode:
        log.warning("MLflow did not take the scores (%s); %s", done.stderr.strip()[-300:], remedy)
    else:
        log.info("scores sent to the run's page in MLflow")
