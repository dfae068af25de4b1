"""status.json and tracking.on_event say what a run is doing, and never disturb it."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.tracking import status as status_module
from dist_deeplab.tracking.status import RunStatus, is_requeued, report_death
from dist_deeplab.tracking.tracker import Reporting, open_tracker, resolve_uri

HOOK = 'echo "$DIST_DEEPLAB_EVENT $(basename "$DIST_DEEPLAB_RUN_DIR") $DIST_DEEPLAB_STATUS" >> "{log}"'


def read(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content


def open_here(run_dir: Path, on_event: str) -> Any:
    run_dir.mkdir()
    info = {"name": "run", "parameters": {"max_steps": 400}}
    reporting = Reporting("none", "e", on_event=on_event)
    return open_tracker(run_dir, env=DistEnv(), reporting=reporting, config_yaml="", run_info=info)


@pytest.mark.parametrize(
    ("status", "environ", "event"),
    [
        ("FINISHED", {}, "finished"),
        ("FAILED", {}, "failed"),
        ("KILLED", {}, "stopped"),
        ("KILLED", {"DIST_DEEPLAB_OUTCOME": "/x"}, "stopped"),  # dist-deeplab torchrun's
        ("KILLED", {"DIST_DEEPLAB_REQUEUES": "20"}, "requeued"),
        ("KILLED", {"DIST_DEEPLAB_REQUEUES": "3", "SLURM_RESTART_COUNT": "3"}, "stopped"),
    ],
)
def test_start_and_end_are_told_to_file_command_and_journal(
    status: str, environ: dict[str, str], event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    tracker = open_here(tmp_path / "run", HOOK.format(log=tmp_path / "log"))
    wait_for_line(tmp_path / "log")
    tracker.log(132, {"train/loss": 1.0})
    tracker.log(133, {})
    tracker.close(status)
    content = read(tmp_path / "run")
    assert (content["event"], content["step"], content["max_steps"], content["attempt"]) == (event, 133, 400, 0)
    assert content["note"] == f"{event}, step 133 of 400"
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("started run {")
    assert second.startswith(f"{event} run {{") and json.loads(second.partition(" run ")[2]) == content
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["status"], last["note"]) == (status, content["note"])


def wait_for_line(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_step_is_updated_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(status_module.time, "monotonic", lambda: now[0])
    status = RunStatus(tmp_path, max_steps=9)
    for step in range(1, 9):
        status.at(step)
        now[0] += 2.0
    assert (read(tmp_path)["event"], read(tmp_path)["step"]) == ("running", 7)


HANGS = 'until [ -e "$DIST_DEEPLAB_RUN_DIR/over" ]; do sleep 0.1; done'


@pytest.mark.parametrize("command", ["exit 3", "no-such-command", HANGS])
def test_a_command_that_fails_or_hangs_does_not_disturb(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    monkeypatch.setattr(status_module, "_HOOK_WAIT_S", 0.5)
    tracker = open_here(tmp_path / "run", command)
    try:
        tracker.close("FINISHED")
    finally:
        (tmp_path / "run/over").touch()
    assert ("tracking.on_event failed at finished" in caplog.text) == (command != HANGS)


def test_a_run_that_is_gone_without_a_word_has_failed(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, max_steps=400, attempt=2)
    status.at(7)
    report_death(tmp_path, HOOK.format(log=tmp_path / "log"))
    assert read(tmp_path)["note"] == "failed, step 7 of 400"
    assert (tmp_path / "log").read_text().startswith("failed ")
    report_death(tmp_path, HOOK.format(log=tmp_path / "log"))
    assert (tmp_path / "log").read_text().count("failed ") == 1, "said once"
    (tmp_path / "status.json").write_text("damaged")
    report_death(tmp_path, "exit 1")


def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status = RunStatus(tmp_path / "no such folder", max_steps=400, on_event="true")
    for end in (status.begin, lambda: status.end("FINISHED")):
        end()
    assert caplog.text.count("status.json is not written") == 1


def test_only_a_launcher_that_requeues_makes_a_stop_a_requeue() -> None:
    assert not is_requeued({"SLURM_JOB_ID": "1"})
    assert is_requeued({"DIST_DEEPLAB_REQUEUES": "20", "SLURM_RESTART_COUNT": "19"})
    assert not is_requeued({"DIST_DEEPLAB_REQUEUES": "20", "SLURM_RESTART_COUNT": "20"})


@pytest.mark.parametrize("name", ["a#1", "a?1", "a%20b"])
def test_a_folder_that_no_address_can_hold_is_refused_unless_the_store_is_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"choose another output_dir"):
        resolve_uri("", str(tmp_path / name))
    assert resolve_uri("none", str(tmp_path / name)) == "none"
    assert resolve_uri("", str(tmp_path / "a b")).endswith("/a b/mlflow.db")
