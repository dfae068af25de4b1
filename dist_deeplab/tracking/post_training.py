"""Post-training results, e.g. of `evaluate`: into the journal of the run's folder, and on to MLflow."""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking.journal import JOURNAL, Journal
from dist_deeplab.tracking.mlflow.process import BUSY, Upload, send_once
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import choose_store
from dist_deeplab.tracking.run_files import RUN_FILE, read_run_file

log = logging.getLogger(__name__)

_SEND_S = 120.0  # what is not sent by then stays in the journal


def add_to_run(run_dir: Path, step: int, values: Mapping[str, float], folder: Path) -> None:
    """Append points and files to a finished run's journal and send them to its MLflow run.

    The run's status and end time stay as they are. A folder that is not a run's, and one in which a training runs, are
    left alone; the latter with a warning. The folder may be somebody else's: see `choose_store` for where it is sent.

    Args:
        run_dir: the run's folder.
        step: the step that the results are of.
        values: {key: value}; NaN is left out, and so is what the journal holds already.
        folder: of files to send too; left out if it is not inside `run_dir`.
    """
    if not (run_dir / RUN_FILE).is_file():
        return
    try:
        about = read_run_file(run_dir)
        with FileLock(run_dir / "run.lock").acquire(timeout=0):
            _append(run_dir, step, values, folder)
    except Timeout:
        log.warning("a training is running in %s: these results were not added to it", run_dir)
        return
    except UserError as error:
        log.warning("these results were not added to %s: %s", run_dir, error)
        return
    except OSError as error:
        reason = error.strerror or error
        log.warning("these results were not added to the journal of %s (%s); evaluate again then", run_dir, reason)
        return
    _send(run_dir, choose_store(run_dir, about.tracking.uri))


def _append(run_dir: Path, step: int, values: Mapping[str, float], folder: Path) -> None:
    journal = Journal(run_dir / JOURNAL)
    try:
        common = {"step": step, "time": round(time.time(), 3), "late": True}
        attempt = max(0, journal.attempt - 1)  # of the training that these belong to
        points = [
            {**common, "key": key, "value": value, "attempt": attempt}
            for key, value in values.items()
            if math.isfinite(value) and journal.points.get((key, step)) != value
        ]
        root, folder = run_dir.resolve(), folder.resolve()
        files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_relative_to(root) else []
        journal.append_or_fail(*points, *({**common, "file": str(file.relative_to(root))} for file in files))
    finally:
        journal.close()


def _send(run_dir: Path, uri: str) -> None:
    if uri == "none":
        return
    sent = send_once(Upload(run_dir, uri), timeout_s=_SEND_S)
    if sent.code:
        reason = sent.reason if sent.code == BUSY else UploadState(run_dir, uri)["error"] or sent.reason
        log.warning(
            "MLflow did not take the scores (%s); `%s %s` sends them later",
            reason,
            command_name("sync-mlflow"),
            run_dir,
        )
    else:
        log.info("scores sent to the run's page in MLflow, %s", shown_url(uri))
