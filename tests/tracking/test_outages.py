"""A real server that is slow, full, cut off, hanging or killed: no point is lost, and nothing waits for it."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking import run_files
from dist_deeplab.tracking.mlflow import uploader
from dist_deeplab.tracking.mlflow.private import remember_store
from dist_deeplab.tracking.mlflow.process import Upload
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.uploader import Uploader, upload_until_done
from dist_deeplab.tracking.tracker import Reporting, open_tracker
from tests.tracking.conftest import Proxy, Server

STEPS = range(1, 41)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait shortly, and leave the environment as it was: the uploader sets MLflow's variables for its own process."""
    monkeypatch.setattr(uploader, "_POLL_S", 0.05)
    monkeypatch.setattr(uploader, "_RETRY_S", (0.1,))
    environ = dict(os.environ)
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    yield
    os.environ.clear()
    os.environ.update(environ)


def start_run(folder: Path, uri: str, *, with_uploader: bool = False, **tags: str) -> Any:
    """The tracker of a run that has just begun."""
    folder.mkdir()
    info = {"name": folder.name, "parameters": {"seed": 1}, "tags": tags}
    tracker = open_tracker(
        folder, env=DistEnv(), reporting=Reporting("none", "outages"), config_yaml="seed: 1\n", run_info=info
    )
    run_files.write_run_file(folder, uri=uri, experiment="outages", attempt=0, run_info=info)
    remember_store(shown_url(uri))  # as one that was set for a run
    if with_uploader:
        tracker.start_uploader(Upload(folder, uri))
    return tracker


def log_steps(tracker: Any, steps: range = STEPS) -> None:
    for step in steps:
        tracker.log(step, {"train/loss": 1.0 / step})


def assert_complete(server: Server, name: str) -> None:
    run = server.run("outages", name)
    assert run.info.status == "FINISHED"
    assert server.curve(run, "train/loss") == [(step, 1.0 / step) for step in STEPS]


def test_errors_cut_connections_and_a_slow_server_cost_no_point(server: Server, proxy: Proxy, tmp_path: Path) -> None:
    folder = tmp_path / "troubled"
    tracker = start_run(folder, proxy.uri)
    modes = iter(["500", "cut", "ok", "500", "slow", "cut", "500", "ok"])
    asked = 0

    def is_running() -> bool:
        nonlocal asked
        proxy.mode = next(modes, "ok")
        log_steps(tracker, STEPS[5 * asked : 5 * (asked + 1)])
        asked += 1
        if asked == 8:
            tracker.close("FINISHED")
        return asked < 8

    assert upload_until_done(Uploader(folder), is_running=is_running)
    assert_complete(server, "troubled")
    state = json.loads((folder / "mlflow.json").read_text())
    assert state["error"] == ""
    assert 3 <= state["failed_sends"] <= 5


def test_training_continues_while_the_server_hangs_and_says_so_once(
    server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All points are in the journal before the server has answered a single request."""
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    folder = tmp_path / "hanging"
    proxy.mode = "hang"
    tracker = start_run(folder, proxy.uri, with_uploader=True)
    wait_for(lambda: proxy.num_requests > 0)
    log_steps(tracker, STEPS[:30])
    assert proxy.num_requests <= 2, "the server has answered nothing"
    assert (folder / "metrics.jsonl").read_text().count('"train/loss"') == 30
    wait_for(lambda: UploadState(folder)["error"])
    log_steps(tracker, STEPS[30:])
    assert caplog.text.count("MLflow does not take points") == 1
    proxy.mode = "ok"
    tracker.close("FINISHED")
    assert tracker.uploader.process.wait(60) == 0
    assert_complete(server, "hanging")
    assert server.curve(server.run("outages", "hanging"), "tracking/failed_sends")[-1][1] >= 1


def test_what_was_not_sent_is_sent_by_hand_once_a_killed_server_is_back(server: Server, tmp_path: Path) -> None:
    """SIGKILL of the server in the middle of a run; the run ends without it; sync-mlflow sends the rest."""
    folder = tmp_path / "killed_server"
    tracker = start_run(folder, server.uri)
    log_steps(tracker, STEPS[:10])
    Uploader(folder).send_new()
    server.kill()
    log_steps(tracker, STEPS[10:])
    tracker.close("FINISHED")
    assert not upload_until_done(Uploader(folder), is_running=lambda: False, give_up_s=0.0)
    server.start()
    sync = [sys.executable, "-m", "dist_deeplab", "sync-mlflow", str(folder), str(tmp_path)]
    done = subprocess.run(sync, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"{folder}: sent to {server.uri}", "1 of 1 run is in MLflow"], done.stderr
    assert_complete(server, "killed_server")


def wait_for(condition: Any, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
