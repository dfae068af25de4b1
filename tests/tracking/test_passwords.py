"""A real server with passwords (`mlflow server --app-name basic-auth`): they open it, and are written nowhere."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from dist_deeplab.tracking.mlflow.uploader import Uploader, upload_until_done
from dist_deeplab.tracking.tracker import resolve_uri
from tests.conftest import command_environ
from tests.tracking.conftest import Server
from tests.tracking.test_outages import assert_complete, log_steps, start_run

PASSWORD = "s3cret/word of @ server"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("guarded_server"), empty_store, password=PASSWORD)
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _environ() -> Iterator[None]:
    environ = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environ)


def assert_no_secret(*folders: Path) -> None:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert b"s3cret" not in path.read_bytes(), path


def test_a_password_opens_the_server_a_wrong_or_missing_one_loses_nothing_and_none_is_written(
    guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "secret"
    output = logging.FileHandler(tmp_path / "uploader.log")
    logging.getLogger("mlflow_uploader").addHandler(output)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong s3cret")
    token = PASSWORD.partition(" ")[0]  # as somebody may have in a command
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    tracker = start_run(folder, guarded.uri, command=f"data.train=https://me:s3cret@host/t.json token={token}")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    log_steps(tracker)
    tracker.close("FINISHED")
    assert not upload_until_done(Uploader(folder), is_running=lambda: False, give_up_s=0.0)
    error = json.loads((folder / "mlflow.json").read_text())["error"]
    assert "MLFLOW_TRACKING_PASSWORD" in error and "not authenticated" in error, "what to do, and what the server said"
    logging.getLogger("mlflow_uploader").removeHandler(output)

    sync = [sys.executable, "-m", "dist_deeplab", "sync-mlflow", str(folder)]
    environ = command_environ()
    del environ["MLFLOW_TRACKING_USERNAME"], environ["MLFLOW_TRACKING_PASSWORD"]
    missing = subprocess.run(sync, env=environ, capture_output=True, text=True, timeout=120)
    assert missing.returncode == 1
    assert "MLFLOW_TRACKING_PASSWORD" in missing.stdout
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    done = subprocess.run(sync, env=command_environ(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete(guarded, "secret")
    assert guarded.run("outages", "secret").data.tags["command"] == "data.train=https://me:***@host/t.json token=***"
    assert_no_secret(tmp_path, guarded.folder)


def test_a_password_in_the_address_of_the_environment_works_and_is_written_nowhere(
    guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = quote(PASSWORD, safe="")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.uri.replace("//", f"//me:{encoded}@"))
    folder = tmp_path / "address"
    tracker = start_run(folder, resolve_uri("", "runs"))
    recorded = json.loads((folder / "run.json").read_text())["tracking"]["uri"]
    assert recorded == guarded.uri, "without the user too"
    log_steps(tracker)
    tracker.close("FINISHED")
    assert upload_until_done(Uploader(folder), is_running=lambda: False)
    assert_complete(guarded, "address")
    assert_no_secret(tmp_path, guarded.folder)
