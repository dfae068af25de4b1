"""What is recorded of a run's origin is right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_deeplab.tracking.provenance import git_revision, library_versions, slurm_job, summarize


@pytest.mark.parametrize(("status", "dirty"), [("", "false"), (" M train.py", "true")])
def test_the_revision_of_the_code_is_recorded(
    status: str, dirty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = tmp_path / "git"
    git.write_text(f'#!/bin/sh\n[ "$1" = rev-parse ] && echo abc123\n[ "$1" = status ] && echo "{status}"\nexit 0\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert git_revision() == {"git_revision": "abc123", "git_dirty": dirty}


def test_without_git_or_outside_a_checkout_there_is_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == {}
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexit 128\n")
    git.chmod(0o755)
    assert git_revision() == {}


def test_versions_are_those_of_the_installed_libraries_and_import_none() -> None:
    program = (
        "import json, sys; from dist_deeplab.tracking.provenance import library_versions as v; "
        "print(json.dumps([v(), sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    versions, modules = json.loads(done.stdout)
    assert versions == library_versions()
    assert versions["version/mlflow"][0].isdigit()
    assert {"mlflow", "torch", "numpy"}.isdisjoint(modules)


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "123"}, "123"),
        ({"SLURM_JOB_ID": "124", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}, "120_4"),
    ],
)
def test_the_slurm_job_is_named_as_slurm_names_it(
    environ: dict[str, str], job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert slurm_job() == job


def test_equal_devices_are_counted() -> None:
    assert summarize(["CPU"]) == "CPU"
    assert summarize(["H100", "H100", "A100"]) == "2 x H100, A100"
