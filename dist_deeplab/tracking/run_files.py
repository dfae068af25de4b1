"""The two small files that tell what a run's folder is: `run.json`, and `mlflow.json` about its copy in MLflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_deeplab.files import replace_text
from dist_deeplab.redaction import redact_all
from dist_deeplab.tracking.provenance import slurm_job

RUN_FILE = "run.json"
MLFLOW_FILE = "mlflow.json"  # what the uploader remembers: run id, and how much of the journal was sent


def write_run_file(run_dir: Path, *, uri: str, experiment: str, attempt: int, run_info: Mapping[str, Any]) -> None:
    """Write `run.json`, without secrets; the ids of the Slurm jobs of earlier attempts are kept."""
    jobs = [*read_run_file(run_dir).get("slurm_jobs", []), *([slurm_job()] if slurm_job() else [])]
    about = {
        "tracking": {"uri": uri, "experiment": experiment},
        "attempt": attempt,
        "slurm_jobs": list(dict.fromkeys(jobs)),
        **run_info,
    }
    replace_text(run_dir / RUN_FILE, json.dumps(redact_all(about), indent=1) + "\n")


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """Return what `run.json` holds, nothing where there is none."""
    return _read_json(run_dir / RUN_FILE)


def mlflow_run_id(run_dir: Path) -> str:
    """Return the id of the folder's run in MLflow, or nothing before the uploader has made one."""
    return read_mlflow_file(run_dir).get("run_id") or ""


def read_mlflow_file(run_dir: Path) -> dict[str, Any]:
    """Return what the uploader remembers of the run's copy in MLflow (see UploadState), nothing before it began."""
    return _read_json(run_dir / MLFLOW_FILE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
