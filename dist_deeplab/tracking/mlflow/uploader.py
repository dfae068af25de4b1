"""Send a run's journal to MLflow: while the run is in training, or afterwards.

    python -m dist_deeplab.tracking.mlflow.uploader RUN_DIR [--uri URI] [--follow PID | --once] [--new-run]

Reads RUN_DIR/metrics.jsonl from where it stopped last time (kept in RUN_DIR/mlflow.json) and sends points with the
journal's own times, so that sending one twice changes nothing. With --follow it continues until the journal ends the
run or process PID is gone. When the server can't be reached it waits and tries again; the journal is the queue.

Training starts one for each run; `dist-deeplab sync-mlflow` does the same for many runs that could not be sent. Exit
codes: 0 all was sent, 1 some was not, 2 wrong arguments, 3 another process is sending.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError
from dist_deeplab.locks import file_lock
from dist_deeplab.redaction import redact, shown_url
from dist_deeplab.tracking.journal import JOURNAL, read_records
from dist_deeplab.tracking.mlflow.process import BUSY, GIVE_UP_S
from dist_deeplab.tracking.mlflow.run import MlflowRun
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import choose_store, explain
from dist_deeplab.tracking.run_files import read_run_file
from dist_deeplab.tracking.status import report_death
from dist_deeplab.tracking.system_metrics import FOLDER as SYSTEM_FOLDER

log = logging.getLogger("mlflow_uploader")

Record = dict[str, Any]
_POLL_S = 1.0
_RETRY_S = (2.0, 5.0, 15.0, 30.0)  # waits after one, two, three, and more failures in a row
_HANDOVER_S = 45.0  # one that lingers after its run leaves the folder to others between two tries, of 20 s at most
_BATCH = 500  # MLflow takes at most 1000 metrics a call
_MODEL_TIMEOUT_S = 3600.0


class Uploader:
    """One run's way from journal to MLflow.

    uri: the store, where not the one of `choose_store`. model_options: of `dist_deeplab.log_model` where the best
    checkpoint is to be logged after the end.

    Raises:
        UserError: not a run's folder.
    """

    def __init__(self, run_dir: Path, *, uri: str = "", model_options: list[str] | None = None) -> None:
        self.run_dir = run_dir
        self.about = read_run_file(run_dir)
        self.uri = choose_store(run_dir, self.about.tracking.uri, uri)
        self.state = UploadState(run_dir, self.uri)
        self.run: MlflowRun | None = None
        self.model_options = model_options
        self._last_time: float | None = None

    def connect(self) -> MlflowRun:
        """Open the store, and the run: a new one, or the one that this folder has had from the start."""
        if self.run is None:
            run = MlflowRun(self.run_dir, self.about, self.state, self.uri)
            first = next((record for record, _ in read_records(self.run_dir / JOURNAL) if "time" in record), {})
            run.open(first.get("time"))
            self.run = run
        return self.run

    def send_new(self) -> str | None:
        """Send what the journal holds beyond the last call; the status once the journal ends the run."""
        run = self.connect()
        for path in sorted((self.run_dir / SYSTEM_FOLDER).glob("*.jsonl")):
            for batch, end in _batches(read_records(path, self._sent_of_node(path.name))):
                run.send(batch)
                self.state.save(sent_system={**self.state["sent_system"], path.name: end})
        for batch, end in _batches(read_records(self.run_dir / JOURNAL, self.state["sent_bytes"])):
            run.send(batch)
            self.state.save(sent_bytes=end)
            self._last_time = max((r["time"] for r in batch if _is_of_training(r)), default=self._last_time)
            ending = [r for r in batch if r.get("status", "RUNNING") != "RUNNING" and self._is_current(r)]
            if ending:
                self.state.save(status=ending[-1]["status"], note=str(ending[-1].get("note", "")))
                return str(ending[-1]["status"])
        return None

    def finish(self, status: str) -> None:
        """Set the run's final status, and log its model where that is wanted."""
        run = self.connect()
        if self._last_time is None:  # nothing new but, perhaps, post-training results
            records = (record for record, _ in read_records(self.run_dir / JOURNAL))
            self._last_time = max((r["time"] for r in records if _is_of_training(r)), default=None)
        run.finish(status, self._last_time, note=self.state["note"])
        if status == "FINISHED" and self.model_options is not None:
            self._log_model(self.model_options)

    def _log_model(self, options: list[str]) -> None:
        """Log the best checkpoint as a model, unless that was done: by a process of its own, since it imports torch."""
        self.state.load()
        if self.state["model"]:
            return
        command = [sys.executable, "-m", "dist_deeplab.log_model", str(self.run_dir), "--uri", shown_url(self.uri)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=_MODEL_TIMEOUT_S)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(f"the model could not be logged: {reason[-300:]}")
        self.state.load()

    def note_failure(self, error: Exception) -> None:
        """Count a failure of the store, for the run to see; a full disk here does not stop it."""
        self.run = None
        try:
            self.state.save(failed_sends=self.state["failed_sends"] + 1, error=explain(error))
        except OSError as disk:
            log.warning("cannot write to %s: %s", self.run_dir, disk)

    def note_success(self) -> None:
        """Forget the last failure."""
        if self.state["error"]:
            self.state.save(error="")

    def _is_current(self, record: Record) -> bool:
        return bool(record["attempt"] == self.about.attempt)

    def _sent_of_node(self, name: str) -> int:
        sent = self.state["sent_system"].get(name, 0)
        return sent if isinstance(sent, int) and sent >= 0 else 0


def upload_until_done(
    uploader: Uploader,
    *,
    is_running: Callable[[], bool],
    give_up_s: float = GIVE_UP_S,
    pause: Callable[[float, bool], None] = lambda seconds, is_alive: time.sleep(seconds),
) -> bool:
    """Send until the journal ends the run, or the run's process is gone; whether all was sent.

    Once the run has ended, a store that takes nothing is given up after `give_up_s`. `pause` sleeps between two tries.
    """
    failures = 0
    ended_at: float | None = None
    while True:
        alive = is_running()  # asked before reading, so that nothing written before its death is missed
        try:
            status = uploader.send_new()
            status = status or uploader.state["status"] or (None if alive else "FAILED")
            if failures:
                log.warning("MLflow takes points again")
            failures = 0
            if status is not None:
                uploader.finish(status)
            uploader.note_success()
            if status is not None:
                return True
        except Exception as error:  # whatever MLflow, its database or the network may raise
            failures += 1
            uploader.note_failure(error)
            if failures == 1:
                log.warning("MLflow does not take points (%s); trying again, nothing is lost", explain(error))
            if not alive:
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at >= give_up_s:
                    log.warning("giving up; `%s %s` sends the rest", command_name("sync-mlflow"), uploader.run_dir)
                    return False
        pause(_RETRY_S[min(failures, len(_RETRY_S)) - 1] if failures else _POLL_S, alive)


def _is_of_training(record: Record) -> bool:
    """Whether training was running at the record's time: post-training results say nothing of its end."""
    return "time" in record and not record.get("late")


def _batches(records: Iterator[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    batch: list[Record] = []
    end = 0
    for record, end in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch, end
            batch = []
    if batch:
        yield batch, end


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return os.getppid() == pid


def main() -> int:
    arguments = _parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_without_secrets)
    if arguments.follow is not None:
        os.nice(10)  # training goes first; beside it, a command that somebody waits for would take minutes
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm warns all processes of a step; this one outlives the run
    lock = file_lock(arguments.run_dir / "mlflow.lock")
    try:
        # The uploader of an attempt that was killed may still be sending; it ends as soon as it is done.
        with lock.acquire(timeout=_HANDOVER_S if arguments.once else GIVE_UP_S):
            return _send(arguments, lock)
    except Timeout:
        log.warning("another process is sending %s just now, and ends by itself", arguments.run_dir)
        return BUSY
    except UserError as error:
        log.warning("%s", error)
        return error.exit_code


def _send(arguments: argparse.Namespace, lock: FileLock) -> int:
    options = ["--register-as", arguments.register_as] if arguments.register_as else []
    uploader = Uploader(arguments.run_dir, uri=arguments.uri, model_options=options if arguments.log_model else None)
    if arguments.new_run:
        uploader.state.start_over()
    pid = arguments.follow

    def pause(seconds: float, is_alive: bool) -> None:
        """Sleep; after the end of the run let others send meanwhile, e.g. sync-mlflow, and see what they have sent."""
        if is_alive:
            time.sleep(seconds)
            return
        lock.release()
        time.sleep(seconds)
        lock.acquire(timeout=GIVE_UP_S)
        uploader.state.load()

    done = upload_until_done(
        uploader,
        is_running=lambda: pid is not None and _process_exists(pid),
        give_up_s=0.0 if arguments.once else GIVE_UP_S,
        pause=pause,
    )
    if pid is not None and not uploader.state["note"]:
        report_death(arguments.run_dir, os.environ.get("DIST_DEEPLAB_ON_EVENT", ""))
    return 0 if done else 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dist_deeplab.tracking.mlflow.uploader", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--uri", default="", help="MLflow store, where not the one of the environment or the default")
    parser.add_argument("--once", action="store_true", help="do not wait for a store that is away")
    parser.add_argument("--follow", type=int, metavar="PID", help="process that writes the journal")
    parser.add_argument("--log-model", action="store_true", help="log the best checkpoint as a model after the end")
    parser.add_argument("--register-as", default="", metavar="NAME", help="register that model")
    parser.add_argument("--new-run", action="store_true", help="send all to a new run of MLflow")
    arguments = parser.parse_args()
    if arguments.uri and shown_url(arguments.uri) != arguments.uri:
        os.environ["MLFLOW_TRACKING_URI"] = arguments.uri  # with its password; the folder gets it without
        arguments.uri = shown_url(arguments.uri)
    try:
        recorded = read_run_file(arguments.run_dir).tracking.uri
    except UserError as error:
        parser.error(str(error))
    if choose_store(arguments.run_dir, recorded, arguments.uri) == "none":
        parser.error(f"{arguments.run_dir} was run with tracking.uri=none; say where to send it with --uri")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
