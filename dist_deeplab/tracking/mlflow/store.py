"""Where MLflow keeps its data: which store, opened how, with whose password; importing this does not import MLflow."""

import contextlib
import importlib.metadata
import os
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from dist_deeplab.errors import UserError
from dist_deeplab.locks import file_lock
from dist_deeplab.redaction import redact, shown_url
from dist_deeplab.tracking.mlflow.private import known_stores, private_folder

_SCHEMES = {"", "file", "http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc"}
_LOCK_S = 60.0  # making a database's tables takes some seconds
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI's pages for training, not for GenAI


class StoreError(Exception):
    """The store works, and will not take this run until somebody does what the message says."""


def choose_store(run_dir: Path, recorded: str, given: str = "") -> str:
    """The address of the store that a run's folder is sent to; `none` for a run that is not to be sent.

    A folder may be a copy, or somebody else's: what it says (`recorded`, without secrets) is taken only if it is the
    store of the environment, or one that this user has set for a run before. Otherwise it is the environment's, or the
    SQLite file beside the folder.

    Args:
        given: what the user says now, which wins; without its secrets where the environment has them.
    """
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    wanted = given or shown_url(recorded)
    if wanted and wanted == shown_url(from_environment):
        return from_environment  # with its secrets
    if given or wanted == "none" or wanted in known_stores():
        return wanted
    return from_environment or default_store(run_dir.absolute().parent.resolve())


def default_store(output_dir: Path) -> str:
    """The SQLite file in the folder of all runs."""
    return f"sqlite:///{output_dir / 'mlflow.db'}"


def require_known_store(uri: str) -> None:
    """Check that a URI is of a kind of store that MLflow, or a plugin of it, knows; none is fine.

    Raises:
        UserError: it is not: nothing could ever be sent there.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]  # postgresql+psycopg
    plugins = {point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")}
    if scheme not in _SCHEMES | plugins:
        raise UserError(
            f"{shown_url(uri)}: MLflow knows no store of the kind {scheme!r}; use http(s)://HOST:PORT, "
            "sqlite:///FILE, postgresql, mysql, mssql, or none for no MLflow"
        )


def take_credentials(uri: str, environ: MutableMapping[str, str] = os.environ) -> str:
    """Move user and password of a server's URI to the variables that MLflow reads; the URI without them.

    In an address they would be part of every error message.
    """
    url = urlsplit(uri)
    if url.scheme not in ("http", "https") or "@" not in url.netloc:
        return uri
    user, _, host = url.netloc.rpartition("@")
    name, _, password = user.partition(":")
    environ["MLFLOW_TRACKING_USERNAME"] = unquote(name)
    environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    return urlunsplit(url._replace(netloc=host))


def explain(error: Exception) -> str:
    """What MLflow, its database or the network raised, as one line without secrets; a remedy first if known."""
    if isinstance(error, StoreError):
        return redact(str(error))
    text = " ".join(redact(str(error)).split())[:300] or type(error).__name__
    response = getattr(error, "response", None)  # of requests, for files
    status = error.get_http_status_code() if hasattr(error, "get_http_status_code") else None
    status = getattr(response, "status_code", status)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if status == HTTPStatus.UNAUTHORIZED:
        found = f"it does not know {user!r} with this password" if user else "neither is set"
        return f"the server wants MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, {found}: {text}"
    if status == HTTPStatus.FORBIDDEN:
        return f"{user or 'this user'!r} may not write there; whoever made the experiment or model can allow it: {text}"
    return text


def no_telemetry() -> None:
    """Turn MLflow's telemetry off, unless the user wants it; before MLflow is imported.

    Its thread changes os.environ while other threads read it: now and then a request fails of a KeyError.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def open_client(uri: str) -> Any:
    """An MlflowClient of the store, made ready under a lock; its calls fail after seconds instead of minutes.

    Raises:
        Exception: whatever MLflow, its database or the network raises.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the uploader retries, without a 4-minute block
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    no_telemetry()
    import mlflow

    with store_lock(uri):
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            _make_database(path)
        client = mlflow.MlflowClient(take_credentials(uri))
        client.search_experiments(max_results=1)  # makes the tables of another new database
        return client


def _make_database(path: Path) -> None:
    """Make a SQLite store's file, which gets its name when all tables are in it.

    That takes seconds, and MLflow cannot open a store any more whose making was cut off by a kill.
    """
    import mlflow

    unfinished = path.with_name(f".{path.name}.unfinished")
    for left_over in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        left_over.unlink(missing_ok=True)
    mlflow.MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
    os.replace(unfinished, path)


def open_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment, which is made where it is missing.

    Raises:
        StoreError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    with store_lock(uri):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(
                    client.create_experiment(name, artifact_location=artifact_location(uri), tags=_EXPERIMENT_TAGS)
                )
            except MlflowException:  # another host was faster
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise StoreError(
                f"the experiment {name!r} was deleted in {shown_url(uri)}; `mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}` brings it back, tracking.experiment= names another one"
            )
        return str(experiment.experiment_id)


def store_lock(uri: str) -> AbstractContextManager[object]:
    """A lock for opening a store: several processes that open a new database at once ruin it. A server needs none.

    Raises:
        Timeout: another process holds it for longer than `_LOCK_S`.
    """
    path = sqlite_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        return file_lock(Path(f"{path}.lock"), timeout_s=_LOCK_S)
    if urlsplit(uri).scheme in ("http", "https", "databricks", "databricks-uc"):
        return contextlib.nullcontext()
    return file_lock(private_folder() / "mlflow-database.lock", timeout_s=_LOCK_S)


def artifact_location(uri: str) -> str | None:
    """The folder `mlartifacts` beside a SQLite store; a server has a place of its own."""
    path = sqlite_path(uri)
    return (path.resolve().parent / "mlartifacts").as_uri() if path else None


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, or None for another store."""
    url = urlsplit(uri)
    return Path(url.path[1:]) if url.scheme == "sqlite" else None
