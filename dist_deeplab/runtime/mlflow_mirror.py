"""Send a run's journal to MLflow: while the run is going on, or afterwards.

    python -m dist_deeplab.runtime.mlflow_mirror RUN_DIR [--uri URI] [--follow PID]

Reads RUN_DIR/metrics.jsonl from where it stopped last time (kept in RUN_DIR/mlflow.json) and sends points with the
journal's own times, so that sending one twice changes nothing. With --follow it goes on until the journal ends the run
or process PID is gone. When the server can't be reached it waits and tries again; the journal is the queue.
"""

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from filelock import FileLock, Timeout

from dist_deeplab.runtime.tracking import JOURNAL, MLFLOW_FILE, RUN_FILE, parse_record

log = logging.getLogger("mlflow_mirror")

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's pages for training, not for GenAI
_POLL_S = 1.0
_RETRY_S = (2.0, 5.0, 15.0, 30.0)  # waits after one, two, three, and more failures in a row
_GIVE_UP_S = 600.0  # after the run has ended; what is left stays in the journal
_BATCH = 500  # MLflow takes at most 1000 metrics a call


class Mirror:
    """One run's way from journal to MLflow."""

    def __init__(self, run_dir: Path, *, uri: str = "") -> None:
        self.run_dir = run_dir
        self.info = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        self.uri = uri or self.info["tracking"]["uri"]
        self.state: dict[str, Any] = {"run_id": None, "sent_bytes": 0, "status": None, "described": -1}
        if (run_dir / MLFLOW_FILE).exists():
            saved = json.loads((run_dir / MLFLOW_FILE).read_text(encoding="utf-8"))
            if saved.get("uri", self.uri) == self.uri:  # another store begins anew
                self.state.update(saved)
        self.client: Any = None

    def connect(self) -> None:
        """Open the store, and the run: a new one, or the one that this folder has had from the start."""
        if self.client is not None:
            return
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # retrying is done here, without a 4-minute block
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        uri, name = self.uri, self.info["tracking"]["experiment"]
        with store_lock(uri):
            client = mlflow.MlflowClient(uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                try:
                    experiment_id = client.create_experiment(
                        name, artifact_location=artifact_location(uri), tags=_EXPERIMENT_TAGS
                    )
                except MlflowException:  # another host was faster
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
                    experiment_id = found.experiment_id
            else:
                experiment_id = experiment.experiment_id
        if self.state["run_id"] is None:
            self._save_state(run_id=client.create_run(experiment_id, run_name=self.info["name"]).info.run_id)
        run_id, attempt = self.state["run_id"], self.info["attempt"]
        if self.state["described"] < attempt:  # once an attempt; parameters are of the first, they can't change
            if self.state["described"] < 0:
                try:
                    client.log_batch(run_id, params=[Param(k, str(v)) for k, v in self.info["parameters"].items()])
                except MlflowException as error:
                    if error.error_code != "INVALID_PARAMETER_VALUE":
                        raise
                    log.warning("MLflow keeps the first attempt's parameters: %s", error)
            client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in self.info["tags"].items()])
            if (self.run_dir / "config.yaml").exists():
                client.log_artifact(run_id, str(self.run_dir / "config.yaml"))
            client.update_run(run_id, status="RUNNING")
            self._save_state(described=attempt, status=None)
        self.client = client

    def send_new(self) -> str | None:
        """Send what the journal holds beyond the last call; return the status once the journal ends the run."""
        self.connect()
        for batch, end in _batches(self._new_records()):
            metrics = [r for r in batch if "key" in r]
            if metrics:
                self._send_metrics(metrics)
            for record in batch:
                if "file" in record:
                    self._send_file(Path(record["file"]))
            self._save_state(sent_bytes=end)
            ending = [r["status"] for r in batch if "status" in r and r["attempt"] == self.info["attempt"]]
            if ending:
                self._save_state(status=ending[-1])
                return str(ending[-1])
        return None

    def finish(self, status: str) -> None:
        """Set the run's final status."""
        self.connect()
        self.client.set_terminated(self.state["run_id"], status=status)

    def _send_metrics(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(r["key"], r["value"], round(r["time"] * 1000), r["step"]) for r in records]
        try:
            self.client.log_batch(self.state["run_id"], metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(records) == 1:
                log.warning("MLflow refuses the point %s (%s); it stays in the journal", records[0], error)
                return
            for record in records:  # one bad name must not hold up the others
                self._send_metrics([record])

    def _send_file(self, name: Path) -> None:
        path = self.run_dir / name
        if path.exists():
            self.client.log_artifact(self.state["run_id"], str(path), str(name.parent))
        else:
            log.warning("%s is gone; MLflow does without it", path)

    def _new_records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield complete records of the journal with the byte offset behind each."""
        path = self.run_dir / JOURNAL
        if not path.exists():
            return
        with path.open("rb") as file:
            end = file.seek(min(self.state["sent_bytes"], path.stat().st_size))
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield parse_record(line), end

    def _save_state(self, **changes: Any) -> None:
        self.state.update(changes, uri=self.uri)
        temporary = self.run_dir / f".{MLFLOW_FILE}.tmp"
        temporary.write_text(json.dumps(self.state), encoding="utf-8")
        os.replace(temporary, self.run_dir / MLFLOW_FILE)


def store_lock(uri: str) -> FileLock:
    """Return a lock for opening the store: several processes that open a new SQLite store at once ruin it."""
    url = urlparse(uri)
    if url.scheme != "sqlite":
        return FileLock(Path(tempfile.gettempdir()) / f"dist_deeplab-mlflow-{os.getuid()}.lock")
    path = Path(url.path[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def artifact_location(uri: str) -> str | None:
    """Return the folder `mlartifacts` beside a SQLite store; a server has a place of its own."""
    url = urlparse(uri)
    return (Path(url.path[1:]).resolve().parent / "mlartifacts").as_uri() if url.scheme == "sqlite" else None


def mirror_until_done(mirror: Mirror, *, is_running: Callable[[], bool]) -> bool:
    """Send until the journal ends the run, or the run's process is gone; return whether all was sent."""
    failures = 0
    ended_at: float | None = None
    while True:
        alive = is_running()  # asked before reading, so that nothing written before its death is missed
        try:
            status = mirror.send_new()
            if status is None and not alive:
                status = mirror.state["status"] or "FAILED"
            if status is not None:
                mirror.finish(status)
                return True
            if failures:
                log.warning("MLflow takes points again")
            failures = 0
        except Exception as error:  # whatever MLflow, its database or the network may raise
            failures += 1
            mirror.client = None
            if failures == 1:
                log.warning("MLflow does not take points (%s); trying again, nothing is lost", error)
            if not alive:
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > _GIVE_UP_S:
                    log.warning("giving up; run this command again without --follow when MLflow is back")
                    return False
        time.sleep(_RETRY_S[min(failures, len(_RETRY_S)) - 1] if failures else _POLL_S)


def _batches(
    records: Iterator[tuple[dict[str, Any], int]],
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    batch: list[dict[str, Any]] = []
    end = 0
    for record, end in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch, end
            batch = []
    if batch:
        yield batch, end


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return os.getppid() == pid


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dist_deeplab.runtime.mlflow_mirror", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--uri", default="", help="MLflow store, where not the one that the run was started with")
    parser.add_argument("--follow", type=int, metavar="PID", help="process that writes the journal")
    arguments = parser.parse_args()
    if not (arguments.run_dir / RUN_FILE).is_file():
        parser.error(f"{arguments.run_dir} is no run's folder: it has no {RUN_FILE}")
    if Mirror(arguments.run_dir, uri=arguments.uri).uri == "none":
        parser.error(f"{arguments.run_dir} was run with tracking.uri=none; say where to send it with --uri")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    os.nice(10)  # training goes first
    pid = arguments.follow
    lock = FileLock(arguments.run_dir / "mlflow.lock")
    try:
        # The mirror of an attempt that was killed may still be sending; it ends as soon as it is done.
        with lock.acquire(timeout=_GIVE_UP_S):
            done = mirror_until_done(
                Mirror(arguments.run_dir, uri=arguments.uri),
                is_running=lambda: pid is not None and _process_exists(pid),
            )
    except Timeout:
        log.warning("another process is still mirroring %s", arguments.run_dir)
        return 1
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
