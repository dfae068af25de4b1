"""Where a run comes from: code, libraries, hosts, jobs, as facts to record."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

_LIBRARIES = ("torch", "numpy", "opencv-python-headless", "webdataset", "mlflow", "pydensecrf2")


def git_revision() -> dict[str, str]:
    """The revision of the code and whether it was changed, or nothing outside a git checkout."""
    folder = Path(__file__).resolve().parent
    try:
        revision, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_revision": revision.strip(), "git_dirty": str(bool(changes.strip())).lower()}


def library_versions() -> dict[str, str]:
    """{"version/<library>": version} of Python and of all that a run uses."""
    return {f"version/{name}": found for name, found in installed_versions(_LIBRARIES).items()}


def installed_versions(libraries: Iterable[str]) -> dict[str, str]:
    """{library: version} of Python and those of `libraries` that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # optional, or another build of the same
            found[name] = importlib.metadata.version(name)
    return found


def host_name() -> str:
    """The name of this machine: Slurm's for it, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_job() -> str:
    """The id of the Slurm job that this process runs in, `123` or `120_4` of an array, or an empty string."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID", "")


def summarize(values: Iterable[str]) -> str:
    """Distinct values with their numbers, in order of appearance: `8 x H100, 8 x A100`; just `CPU` for one."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return ", ".join(value if count == 1 else f"{count} x {value}" for value, count in counts.items())
