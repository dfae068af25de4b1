"""`run.json`: what a run's folder says about itself, written by training and read by whoever sends or compares it.

A folder may come from somebody else. So the file holds values and flags, never commands; what it names is checked
where it is used (`inside`, `mlflow/run.py`), and a store that it names is used only if the user knows it
(`choose_store`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_deeplab.errors import UserError
from dist_deeplab.files import replace_text
from dist_deeplab.redaction import redact_all, shown_url
from dist_deeplab.tracking.provenance import slurm_job

RUN_FILE = "run.json"


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class TrackingFacts(_Values):
    """Where the run was sent when it was started: the store's address without secrets, and the experiment."""

    uri: str = ""
    experiment: str = "dist_deeplab"


class DatasetFacts(_Values):
    """A set of samples as MLflow shows it; context is training or validation, digest that of its keys."""

    name: str
    context: str
    digest: str
    source: str
    profile: dict[str, Any]


class RunFile(_Values):
    """The content of `run.json`.

    description: Markdown. changed: {key: value} that differs from the defaults. parent: the folder of the sweep that
    the run is of, `../NAME`. children: of a sweep, the names of its runs' folders. log_model, register_as: whether the
    best checkpoint is to be logged as a model, and registered under which name.
    """

    name: str = ""
    tracking: TrackingFacts = TrackingFacts()
    attempt: int = 0
    slurm_jobs: list[str] = []
    parameters: dict[str, Any] = {}
    tags: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    description: str = ""
    datasets: list[DatasetFacts] = []
    parent: str = ""
    children: list[str] | None = None
    log_model: bool = False
    register_as: str = ""


def write_run_file(run_dir: Path, *, uri: str, experiment: str, attempt: int, run_info: Mapping[str, Any]) -> None:
    """Write `run.json`, without secrets; the ids of the Slurm jobs of earlier attempts are kept.

    Raises:
        OSError: e.g. a full disk; what was there is untouched.
    """
    jobs = [*known_run_file(run_dir).slurm_jobs, *([slurm_job()] if slurm_job() else [])]
    about = {
        "tracking": {"uri": shown_url(uri), "experiment": experiment},
        "attempt": attempt,
        "slurm_jobs": list(dict.fromkeys(jobs)),
        **run_info,
    }
    replace_text(run_dir / RUN_FILE, json.dumps(redact_all(about), indent=1) + "\n")


def read_run_file(run_dir: Path) -> RunFile:
    """The content of a folder's `run.json`.

    Raises:
        UserError: there is none, or it does not hold what training writes.
    """
    path = run_dir / RUN_FILE
    try:
        return RunFile.model_validate_json(path.read_bytes())
    except OSError:
        raise UserError(f"{run_dir} is not a run's folder: it has no {RUN_FILE}; give one that training made") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"{path} is not what training writes ({place}: {first['msg']}); repair or delete it") from None


def known_run_file(run_dir: Path) -> RunFile:
    """The content of `run.json`, or that of an empty one where it is missing or damaged."""
    try:
        return read_run_file(run_dir)
    except UserError:
        return RunFile()


def inside(run_dir: Path, name: str) -> Path | None:
    """The file `name` of a run's folder, links resolved; None unless it is a regular file that lies in the folder."""
    try:
        path = (run_dir / name).resolve(strict=True)
        return path if path.is_relative_to(run_dir.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # missing; a NUL in the name; links in a circle
        return None
