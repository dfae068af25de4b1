"""What is recorded of a run's origin is right, and holds no secret."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_deeplab.tracking.provenance import (
    git_revision,
    library_versions,
    redact,
    redact_all,
    slurm_job,
    summarize,
)


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


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("train tracking.uri=https://me:s3cret@host/a b", "train tracking.uri=https://me:***@host/a b"),
        ("postgresql+psycopg2://u:p%40ss@db:5432/x", "postgresql+psycopg2://u:***@db:5432/x"),
        ("http://host:5000/#/experiments/1", "http://host:5000/#/experiments/1"),
        ("data.train=https://h/t.json?X-Amz-Signature=abc&n=1", "data.train=https://h/t.json?X-Amz-Signature=***&n=1"),
        ("https://h/t?sig=abc", "https://h/t?sig=***"),
        ("a word that is the password: hunter2", "a word that is the password: ***"),
        ("sqlite:////home/me@work/runs/mlflow.db", "sqlite:////home/me@work/runs/mlflow.db"),
    ],
)
def test_secrets_are_replaced_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text, {"MLFLOW_TRACKING_PASSWORD": "hunter2"}) == redacted


def test_redaction_reaches_every_string_and_leaves_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "7")
    values = {"a": ["x7", 7, None, True], "b": {"c": "http://u:p@h"}}
    assert redact_all(values) == {"a": ["x***", 7, None, True], "b": {"c": "http://u:***@h"}}


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
