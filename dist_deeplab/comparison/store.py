"""Runs from an MLflow store: of an experiment, of a sweep, or one by one."""

from typing import Any

from dist_deeplab.comparison.record import IOU, MIOU, RunRecord
from dist_deeplab.errors import UserError
from dist_deeplab.redaction import redact
from dist_deeplab.tracking.mlflow.store import explain, open_client, sqlite_path

_CURVES = (
    MIOU,
    "train/loss",
    "lr/backbone",
    "images_per_s",
)  # those whose values over the steps matter, beside val/iou/*
_PARENT = "mlflow.parentRunId"


class Store:
    """An open MLflow store.

    Raises:
        UserError: it can't be opened; a missing SQLite file is not created.
    """

    def __init__(self, uri: str) -> None:
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            raise UserError(f"no MLflow store at {path}; start where runs/ is, or give --uri, or the folders of runs")
        try:
            self._client = open_client(uri)
        except Exception as error:  # whatever MLflow, its database or the network raises
            raise UserError(f"cannot open the MLflow store {redact(uri)}: {explain(error)}") from None
        self.uri = uri

    def runs_of(self, name: str) -> list[RunRecord]:
        """Runs of a run id, of a sweep's run id, or of an experiment's name, oldest first.

        Raises:
            UserError: there is neither such a run nor such an experiment.
        """
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(name)
        except MlflowException:
            return [self._record(each) for each in self._runs_of_experiment(name)]
        parent_of = self._search(run.info.experiment_id, f"tags.`{_PARENT}` = '{name}'")
        return [self._record(each) for each in parent_of or [run]]

    def _runs_of_experiment(self, name: str) -> list[Any]:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            known = ", ".join(repr(each.name) for each in self._client.search_experiments())
            raise UserError(
                f"{name!r} is neither a run's folder, nor a run or experiment in {redact(self.uri)} "
                f"(experiments there: {known})"
            )
        return [run for run in self._search(experiment.experiment_id, "") if "sweep" not in run.data.tags]

    def _search(self, experiment_id: str, condition: str) -> list[Any]:
        return list(self._client.search_runs([experiment_id], condition, order_by=["attributes.start_time ASC"]))

    def _record(self, run: Any) -> RunRecord:
        curves = {key: [(0, value)] for key, value in run.data.metrics.items()}
        for key in curves:
            if key in _CURVES or key.startswith(IOU):
                points = self._client.get_metric_history(run.info.run_id, key)
                curves[key] = sorted({point.step: point.value for point in points}.items())
        return RunRecord(
            name=run.info.run_name,
            source=run.info.run_id,
            status="KILLED" if run.info.status == "SCHEDULED" else run.info.status,  # stopped, and to be resumed
            settings=dict(run.data.params),
            curves=curves,
            tags=dict(run.data.tags),
        )
