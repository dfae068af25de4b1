"""One run in MLflow: all calls that describe it and fill it. Every one of them may be repeated after an outage.

The folder may be somebody else's: only files that lie in it are sent, its parent can only be a folder beside it, and
tags that MLflow gives a meaning of its own are not taken from it.
"""

import functools
import getpass
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_deeplab.errors import UserError
from dist_deeplab.locks import file_lock
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking.mlflow.find_run import FOLDER_TAG, find_run
from dist_deeplab.tracking.mlflow.images import ImageSeries
from dist_deeplab.tracking.mlflow.pages import shown_as, view_of_sweep
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import open_client, open_experiment
from dist_deeplab.tracking.run_files import RunFile, inside, known_run_file, read_run_file

log = logging.getLogger("mlflow_uploader")

Record = dict[str, Any]
_MAX_TEXT = 5000  # MLflow takes tags of 8000 characters and parameters of 6000
_DESCRIPTION = "mlflow.note.content"
_OWN_TAGS = (_DESCRIPTION, "mlflow.runColor")  # those of MLflow's that the journal may set
_TAB10 = "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 7f7f7f bcbd22 17becf"  # matplotlib's ten colours


class MlflowRun:
    """The run of a folder in the store at `uri`.

    Raises:
        Exception: whatever MLflow, its database or the network raises.
    """

    def __init__(self, run_dir: Path, about: RunFile, state: UploadState, uri: str) -> None:
        self.run_dir, self.about, self.state, self.uri = run_dir, about, state, uri
        self.client = open_client(uri)

    @functools.cached_property
    def images(self) -> ImageSeries:
        """The images that MLflow's pages show with a slider."""
        return ImageSeries(self.client, self.run_id)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return str(self.state["run_id"])

    def open(self, started: float | None) -> None:
        """Make the run, unless this folder has one, begun at `started` (s since 1970), and describe this attempt.

        Raises:
            StoreError: the folder's run was deleted in the store.
        """
        parent = parent_run_id(self.run_dir, self.about, self.uri)
        # A sweep's run is made by whoever needs it first.
        with file_lock(self.run_dir / ".mlflow_run.lock", timeout_s=20):
            self.state.load()
            if not find_run(self.client, self.state, self.run_dir):
                self._create(started, parent)
            if self.state["described"] < self.about.attempt:
                self._describe(is_first=self.state["described"] < 0)
                self.state.save(described=self.about.attempt, status="")

    def _create(self, started: float | None, parent: str) -> None:
        experiment_id = open_experiment(self.client, self.about.tracking.experiment, self.uri)
        run = self.client.create_run(
            experiment_id,
            start_time=None if started is None else round(started * 1000),
            run_name=self.about.name or self.run_dir.name,
            tags={"mlflow.parentRunId": parent, "mlflow.runColor": self._color()} if parent else None,
        )
        self.state.save(run_id=run.info.run_id, experiment_id=experiment_id, sent_bytes=0, sent_system={}, described=-1)

    def _color(self) -> str:
        """The colour of a sweep's run in charts: MLflow's own choice may give two runs of a sweep the same."""
        siblings = known_run_file(self.run_dir.absolute().parent / self.about.parent.removeprefix("../")).children or []
        name, colors = self.run_dir.name, _TAB10.split()
        return f"#{colors[siblings.index(name) % len(colors) if name in siblings else 0]}"

    def _describe(self, *, is_first: bool) -> None:
        """Send what is known once an attempt. Parameters are of the first: MLflow refuses to change them."""
        from mlflow.entities import Param, RunTag

        if is_first:
            parameters = {key: str(value)[:_MAX_TEXT] for key, value in self.about.parameters.items()}
            items = [Param(key, value) for key, value in parameters.items()]
            self._unless_refused("MLflow keeps the first attempt's parameters", params=items)
            self._send_datasets()
        tags = {key: str(value)[:_MAX_TEXT] for key, value in self._tags(is_first=is_first).items()}
        self._unless_refused(
            "MLflow refuses facts about the run; they stay in run.json",
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        config = inside(self.run_dir, "config.yaml")
        if config is not None:
            self.client.log_artifact(self.run_id, str(config))
        if not is_first:
            self._set_note("")
        if self.about.children is not None:
            self._share_view()
        self.client.update_run(self.run_id, status="RUNNING")

    def _tags(self, *, is_first: bool) -> dict[str, Any]:
        about = self.about
        tags = {**_without_mlflow_s(about.tags), "mlflow.user": user_name(), "mlflow.source.type": "LOCAL"}
        tags[FOLDER_TAG] = str(self.run_dir.resolve())
        if "git_revision" in tags:
            tags["mlflow.source.git.commit"] = tags["git_revision"]
        if "command" in tags:
            tags["mlflow.source.name"] = "dist_deeplab.train"  # the page shows it, and `command` as it is
        if about.slurm_jobs:
            tags |= {"slurm_jobs": " ".join(about.slurm_jobs), "mlflow.source.type": "JOB"}
        if about.changed:
            tags["not_default"] = " ".join(f"{key}={value}" for key, value in about.changed.items())
        if is_first and about.description:  # later it may be the user's own text
            tags[_DESCRIPTION] = about.description
        return tags

    def _share_view(self) -> None:
        """Keep a view of a sweep's runs, which the sweep's last lines give the address of."""
        from mlflow.exceptions import MlflowException

        words = str(self.about.tags.get("sweep", "")).split()
        keys = [key for key in (word.partition("=")[0] for word in words) if key in self.about.parameters]
        try:
            self.client.set_experiment_tag(self.state["experiment_id"], *view_of_sweep(self.run_id, keys))
        except MlflowException as error:  # e.g. a server on which this user may not change the experiment
            log.warning("the view of the sweep's runs was not kept: %s", error)

    def _send_datasets(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=about.name,
                    digest=about.digest[:36],
                    source_type="local",
                    source=json.dumps({"uri": shown_url(about.source)}),
                    profile=json.dumps(about.profile),
                ),
                [InputTag("mlflow.data.context", about.context)],
            )
            for about in self.about.datasets
        ]
        if inputs:
            self.client.log_inputs(self.run_id, inputs)

    def send(self, records: list[Record]) -> None:
        """Send points, tags and files of the journal, in this order."""
        from mlflow.entities import RunTag

        self._send_points([record for record in records if "key" in record])
        for record in records:
            if "tags" in record:
                tags = [RunTag(k, str(v)[:_MAX_TEXT]) for k, v in _without_mlflow_s(record["tags"]).items()]
                self._unless_refused("MLflow refuses facts about the run; they stay in the journal", tags=tags)
            if "file" in record:
                self._send_file(record)

    def finish(self, status: str, ended: float | None, *, note: str = "") -> None:
        """Set the run's final status, and when it ended; `note`, e.g. `requeued, step 132 of 400`, goes above it."""
        end_time = None if ended is None else round(ended * 1000)
        stopped = status == "KILLED" and note
        self._set_note(note if stopped else "")
        # SCHEDULED is MLflow's word for a run that is to continue later, and not a red cross.
        shown = "SCHEDULED" if stopped and note.startswith("requeued") else status
        self.client.set_terminated(self.run_id, status=shown, end_time=end_time)

    def _set_note(self, note: str) -> None:
        """Put a note above the description, in place of the last one; whatever else is there is the user's."""
        tags = self.client.get_run(self.run_id).data.tags
        before = tags.get(_DESCRIPTION, "")
        after = (f"**{note}**\n\n" if note else "") + re.sub(r"^\*\*(stopped|requeued), step [^*]*\*\*\n\n", "", before)
        if after != before:
            self.client.set_tag(self.run_id, _DESCRIPTION, after)
        if note or "state" in tags:
            self.client.set_tag(self.run_id, "state", note or "not stopped")

    def _send_points(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, r["value"], _in_ms(r), r["step"]) for r in records for key in shown_as(r["key"])]
        if not metrics or self._unless_refused("", metrics=metrics):
            return
        if len(records) == 1:
            log.warning("MLflow refuses the point %s; it stays in the journal", records[0])
            return
        for record in records:  # one bad name must not hold up the others
            self._send_points([record])

    def _unless_refused(self, warning: str, **batch: Any) -> bool:
        """Send a batch; whether MLflow took it. An outage is not a refusal and is raised."""
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

        path = inside(self.run_dir, record["file"])
        if path is None:
            log.warning("%s is not a file in %s; MLflow does without it", record["file"], self.run_dir)
            return
        try:
            if "image" in record:
                self.images.send(path, record["image"], record["step"], _in_ms(record))
            else:
                folder = path.parent.relative_to(self.run_dir.resolve())
                self.client.log_artifact(self.run_id, str(path), None if folder == Path() else str(folder))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            log.warning("MLflow refuses the file of %s (%s); it stays in the run's folder", record, error)


def parent_run_id(run_dir: Path, about: RunFile, uri: str) -> str:
    """The id of the sweep's run that this one is a child of, made where it is missing; else an empty string."""
    if not about.parent:
        return ""
    folder = run_dir.absolute().parent / about.parent.removeprefix("../")
    if not re.fullmatch(r"\.\./[A-Za-z0-9][A-Za-z0-9._-]*", about.parent) or folder.is_symlink():
        log.warning("%r is not a folder beside %s; that goes to MLflow without a parent", about.parent, run_dir)
        return ""
    try:
        parent = read_run_file(folder)
    except UserError as error:
        log.warning("%s; %s goes to MLflow without a parent", error, run_dir)
        return ""
    state = UploadState(folder, uri)
    if not state["run_id"]:
        MlflowRun(folder, parent.model_copy(update={"parent": ""}), state, uri).open(None)
    return str(state["run_id"])


def user_name() -> str:
    """The user's name; the number where the system knows no name for it, as in containers with an arbitrary id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _without_mlflow_s(tags: Mapping[str, Any]) -> dict[str, Any]:
    """Tags of a folder, without those by which MLflow itself is steered (parents, models, users)."""
    return {key: value for key, value in tags.items() if not key.startswith("mlflow.") or key in _OWN_TAGS}


def _in_ms(record: Record) -> int:
    return round(record.get("time", 0) * 1000)
