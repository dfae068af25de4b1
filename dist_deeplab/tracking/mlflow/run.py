"""One run in MLflow: all calls that describe it and fill it. Every one of them may be repeated after an outage."""

import functools
import getpass
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from dist_deeplab.files import replace_text
from dist_deeplab.tracking.mlflow.images import ImageSeries
from dist_deeplab.tracking.mlflow.store import full_uri, open_client, open_experiment
from dist_deeplab.tracking.run_files import MLFLOW_FILE, RUN_FILE

log = logging.getLogger("mlflow_uploader")

Record = dict[str, Any]
_MAX_TEXT = 5000  # MLflow takes tags of 8000 characters and parameters of 6000


class UploadState:
    """What is known of a run's copy in a store, kept in its folder: `mlflow.json`.

    run_id and experiment_id; sent_bytes of the journal, and sent_system of
    each node's file of system metrics; status; described: the attempt that was described;
    failed_sends and error: how often the store refused, and the last refusal while it does; model: the address of the
    logged model.
    """

    def __init__(self, run_dir: Path, uri: str) -> None:
        self._path, self._uri = run_dir / MLFLOW_FILE, uri
        self.values: dict[str, Any] = {
            "run_id": None,
            "experiment_id": None,
            "sent_bytes": 0,
            "sent_system": {},
            "status": None,
            "described": -1,
            "failed_sends": 0,
            "error": "",
            "model": "",
        }
        self.load()

    def load(self) -> None:
        """Take over what the file says, if it is of this store: another one begins anew."""
        if self._path.exists():
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            if saved.get("uri", self._uri) == self._uri:
                self.values.update(saved)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def save(self, **changes: Any) -> None:
        """Take changes and write the file."""
        self.values.update(changes, uri=self._uri)
        replace_text(self._path, json.dumps(self.values))


class MlflowRun:
    """The run of a folder in MLflow.

    What `run.json` may say about it: name, parameters, tags, description (Markdown), changed ({key: value} that differs
    from the defaults), datasets (name, context, digest, source, profile), parent (the folder of the sweep it is of).
    """

    def __init__(self, run_dir: Path, info: Mapping[str, Any], state: UploadState, uri: str) -> None:
        self.run_dir, self.info, self.state, self.uri = run_dir, info, state, uri
        self.client = open_client(full_uri(uri))

    @functools.cached_property
    def images(self) -> ImageSeries:
        """The pictures that MLflow's pages show with a slider."""
        return ImageSeries(self.client, self.run_id)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return str(self.state["run_id"])

    def open(self, started: float | None) -> None:
        """Make the run, unless this folder has one, begun at `started` (s since 1970), and describe this attempt."""
        parent = parent_run_id(self.run_dir, self.info, self.uri)
        with FileLock(self.run_dir / ".mlflow_run.lock", timeout=20):  # a sweep's run is made by whoever needs it first
            self.state.load()
            if self.state["run_id"] is None:
                experiment_id = open_experiment(self.client, self.info["tracking"]["experiment"], full_uri(self.uri))
                run = self.client.create_run(
                    experiment_id,
                    start_time=None if started is None else round(started * 1000),
                    run_name=self.info["name"],
                    tags={"mlflow.parentRunId": parent} if parent else None,
                )
                self.state.save(run_id=run.info.run_id, experiment_id=experiment_id)
            if self.state["described"] < self.info["attempt"]:
                self._describe(is_first=self.state["described"] < 0)
                self.state.save(described=self.info["attempt"], status=None)

    def _describe(self, *, is_first: bool) -> None:
        """Send what is known once an attempt. Parameters are of the first: MLflow refuses to change them."""
        from mlflow.entities import Param, RunTag

        if is_first:
            parameters = {key: str(value)[:_MAX_TEXT] for key, value in self.info["parameters"].items()}
            items = [Param(key, value) for key, value in parameters.items()]
            self._unless_refused("MLflow keeps the first attempt's parameters", params=items)
            self._send_datasets()
        tags = {key: str(value)[:_MAX_TEXT] for key, value in self._tags(is_first=is_first).items()}
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if (self.run_dir / "config.yaml").exists():
            self.client.log_artifact(self.run_id, str(self.run_dir / "config.yaml"))
        self.client.update_run(self.run_id, status="RUNNING")

    def _tags(self, *, is_first: bool) -> dict[str, Any]:
        tags = {**self.info["tags"], "mlflow.user": getpass.getuser(), "mlflow.source.type": "LOCAL"}
        if "git_revision" in tags:
            tags["mlflow.source.git.commit"] = tags["git_revision"]
        if "command" in tags:
            tags["mlflow.source.name"] = "dist_deeplab.train"  # the page shows it, and `command` as it is
        if self.info.get("slurm_jobs"):
            tags |= {"slurm_jobs": " ".join(self.info["slurm_jobs"]), "mlflow.source.type": "JOB"}
        changed = self.info.get("changed", {})
        if changed:
            tags["not_default"] = " ".join(f"{key}={value}" for key, value in changed.items())
        if is_first and self.info.get("description"):  # later it may be the user's own text
            tags["mlflow.note.content"] = self.info["description"]
        return tags

    def _send_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=about["name"],
                    digest=about["digest"][:36],
                    source_type="local",
                    source=json.dumps({"uri": about["source"]}),
                    profile=json.dumps(about["profile"]),
                ),
                [InputTag("mlflow.data.context", about["context"])],
            )
            for about in self.info.get("datasets", [])
        ]
        if inputs:
            self.client.log_inputs(self.run_id, inputs)

    def send(self, records: list[Record]) -> None:
        """Send points, tags and files of the journal, in this order."""
        from mlflow.entities import RunTag

        self._send_points([record for record in records if "key" in record])
        for record in records:
            if "tags" in record:
                tags = [RunTag(key, str(value)[:_MAX_TEXT]) for key, value in record["tags"].items()]
                self.client.log_batch(self.run_id, tags=tags)
            if "file" in record:
                self._send_file(record)

    def finish(self, status: str, ended: float | None) -> None:
        """Set the run's final status, and when it ended."""
        end_time = None if ended is None else round(ended * 1000)
        self.client.set_terminated(self.run_id, status=status, end_time=end_time)

    def _send_points(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(r["key"], r["value"], round(r["time"] * 1000), r["step"]) for r in records]
        if not metrics or self._unless_refused("", metrics=metrics):
            return
        if len(records) == 1:
            log.warning("MLflow refuses the point %s; it stays in the journal", records[0])
            return
        for record in records:  # one bad name must not hold up the others
            self._send_points([record])

    def _unless_refused(self, warning: str, **batch: Any) -> bool:
        """Send a batch; return whether MLflow took it. An outage is no refusal and is raised."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(self.run_id, **batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if warning:
                log.warning("%s: %s", warning, error)
            return False
        return True

    def _send_file(self, record: Record) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._send_existing_file(record)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            log.warning("MLflow refuses the file of %s (%s); it stays in the run's folder", record, error)

    def _send_existing_file(self, record: Record) -> None:
        name = Path(record["file"])
        path = self.run_dir / name
        if not path.exists():
            log.warning("%s is gone; MLflow does without it", path)
        elif "image" in record:
            self.images.send(path, record["image"], record["step"], round(record["time"] * 1000))
        else:
            folder = None if name.parent == Path(".") else str(name.parent)
            self.client.log_artifact(self.run_id, str(path), folder)


def parent_run_id(run_dir: Path, info: Mapping[str, Any], uri: str) -> str:
    """Return the id of the sweep's run that this one is a child of, made where it is missing, or an empty string."""
    if not info.get("parent"):
        return ""
    folder = (run_dir / info["parent"]).resolve()
    if not (folder / RUN_FILE).exists():
        log.warning("the folder of the sweep, %s, is gone; %s goes to MLflow without a parent", folder, run_dir)
        return ""
    state = UploadState(folder, uri)
    if state["run_id"] is None:
        about = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        MlflowRun(folder, about, state, uri).open(None)
    return str(state["run_id"])
