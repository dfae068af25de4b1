"""The journal holds each point once through any number of attempts; other ranks' tracker does nothing at all."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import TrainingError
from dist_deeplab.tracking import tracker as tracker_module
from dist_deeplab.tracking.mlflow import process as uploader_process
from dist_deeplab.tracking.mlflow.process import Upload, UploaderProcess
from dist_deeplab.tracking.tracker import JournalTracker, Reporting, Tracker, open_tracker, resolve_uri

STORE = "http://host:5000"


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def points(run_dir: Path) -> list[tuple[int, str, float, int]]:
    """The points that were logged: those of the run's cost come with every call and are left out."""
    found = [(r["step"], r["key"], r["value"], r["attempt"]) for r in read_journal(run_dir) if "key" in r]
    return [point for point in found if not point[1].startswith("cost/")]


def append_line(journal: Path, record: dict[str, Any]) -> None:
    with journal.open("a") as file:
        file.write(json.dumps(record) + "\n")


def open_here(run_dir: Path, **changes: Any) -> Tracker:
    arguments = {
        "env": DistEnv(),
        "reporting": Reporting("none", "e"),
        "config_yaml": "seed: 0\n",
        "run_info": {"name": "n"},
    }
    return open_tracker(run_dir, **(arguments | changes))


# --- points -----------------------------------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl \(Is a directory\).* the same command resumes"):
        open_here(tmp_path)


@pytest.mark.parametrize(("periods", "compared"), [((3, 3), True), ((3, 1), False), ((3, 1, 3), False)])
def test_means_over_other_steps_are_not_compared_after_a_resume(
    tmp_path: Path, periods: tuple[int, ...], compared: bool
) -> None:
    """With another `tracking.log_every` the loss of step 3 is of other steps: no sign that the run is another.

    Nor is another best score: it depends on which steps were evaluated.
    """
    for number, log_every in enumerate(periods):
        run_info = {"name": "n", "parameters": {"tracking.log_every": log_every}}
        tracker = open_here(tmp_path, run_info=run_info)
        tracker.log(3, {"train/loss": 2.0 + number, "lr/backbone": 0.1})
        tracker.log(4, {"val/mIoU": 0.5 + number / 8, "val/best_mIoU": 0.5 + number / 4})
        tracker.close("KILLED")
    news = [point for point in points(tmp_path) if point[1] == "tracking/diverged_points"]
    assert [value for *_, value, _ in news][:2] == ([1.0, 2.0] if compared else [1.0]), "val/mIoU always"


def test_a_point_is_one_line_with_step_time_key_value_and_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module.time, "time", lambda: 1790000000.1234)
    tracker = JournalTracker(tmp_path)
    tracker.log(12, {"train/loss": 2.31, "lr/backbone": 1e-4})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[0] == (
        '{"step": 12, "time": 1790000000.123, "key": "train/loss", "value": 2.31, "attempt": 0}'
    )
    assert points(tmp_path) == [(12, "train/loss", 2.31, 0), (12, "lr/backbone", 1e-4, 0)]


def test_a_point_is_in_the_file_at_once(tmp_path: Path) -> None:
    """Nothing waits in this process's memory for `close`: it may be killed."""
    tracker = JournalTracker(tmp_path)
    for step in range(3):
        tracker.log(step, {"a": float(step)})
        assert len(points(tmp_path)) == step + 1


@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_values_keep_every_digit(values: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    tracker = JournalTracker(run_dir)
    for step, value in enumerate(values):
        tracker.log(step, {"a": value})
    tracker.close("FINISHED")
    assert [value for _, _, value, _ in points(run_dir)] == values


def test_a_value_that_is_not_finite_is_not_a_point_and_every_line_is_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    tracker = JournalTracker(tmp_path)
    tracker.log(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    tracker.log(1, {"a": 2.0})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert points(tmp_path) == [(1, "c", 1.0, 0), (1, "a", 2.0, 0)]


def test_a_point_that_comes_again_after_a_resume_is_left_as_it_is(tmp_path: Path) -> None:
    first = JournalTracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step), "other": 0.0})
    # killed here; the checkpoint was of step 1
    second = JournalTracker(tmp_path)
    for step in (2, 3, 4):
        second.log(step, {"train/loss": step + 0.5, "new": 1.0})
    losses = [(step, value, attempt) for step, key, value, attempt in points(tmp_path) if key == "train/loss"]
    assert losses == [(1, 1.0, 0), (2, 2.0, 0), (3, 3.0, 0), (4, 4.5, 1)]
    assert [step for step, key, *_ in points(tmp_path) if key == "new"] == [2, 3, 4]


def test_a_point_that_comes_twice_in_one_attempt_is_left_as_it_is(tmp_path: Path) -> None:
    tracker = JournalTracker(tmp_path)
    tracker.log(1, {"a": 1.0})
    tracker.log(1, {"a": 2.0, "b": 3.0})
    assert points(tmp_path) == [(1, "a", 1.0, 0), (1, "b", 3.0, 0)]


def test_attempts_are_counted(tmp_path: Path) -> None:
    for attempt in range(4):
        tracker = JournalTracker(tmp_path)
        assert tracker.journal.attempt == attempt
        tracker.log(attempt, {"a": 0.0})
        if attempt % 2:
            tracker.close("KILLED")
    assert [attempt for *_, attempt in points(tmp_path)] == [0, 1, 2, 3]


def test_the_end_of_a_run_is_a_line_with_its_status(tmp_path: Path) -> None:
    JournalTracker(tmp_path).close("KILLED")
    JournalTracker(tmp_path).close("FINISHED")
    endings = [(record["status"], record["attempt"]) for record in read_journal(tmp_path)]
    assert endings == [("KILLED", 0), ("FINISHED", 1)]


def test_files_are_recorded_by_their_path_under_the_runs_folder(tmp_path: Path) -> None:
    def write() -> list[Path]:
        made = tmp_path / "eval" / "step_00000005" / "metrics.json"
        made.parent.mkdir(parents=True)
        made.write_text("{}")
        return [made]

    JournalTracker(tmp_path).log_files(5, write)
    (record,) = read_journal(tmp_path)
    assert (record["step"], record["file"]) == (5, "eval/step_00000005/metrics.json")


# --- damage -----------------------------------------------------------------------------------------------------------


def test_an_unfinished_last_line_is_cut_wherever_it_was_torn(tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_line(journal, {"step": step, "time": 1.0, "key": "a", "value": float(step), "attempt": 0})
    whole = journal.read_bytes()
    start_of_last = whole.index(b"\n") + 1
    for length in range(start_of_last, len(whole)):
        journal.write_bytes(whole[:length])
        tracker = JournalTracker(tmp_path)
        assert journal.read_bytes() == whole[:start_of_last]
        tracker.log(2, {"a": 2.5})
        assert points(tmp_path) == [(1, "a", 1.0, 0), (2, "a", 2.5, 1)]


def test_an_empty_journal_is_a_first_attempt(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert JournalTracker(tmp_path).journal.attempt == 0


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 40 + b"\n", b"\xff\xfe\n", b"{half\n", b"[]\n", b"\n"],
    ids=["zeros", "no text", "half", "no object", "blank"],
)
def test_a_damaged_line_does_not_keep_a_run_from_resuming(damage: bytes, tmp_path: Path) -> None:
    """A node that loses power may leave zeros where the file system had promised data."""
    tracker = JournalTracker(tmp_path)
    tracker.log(1, {"a": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as journal:
        journal.write(damage)
    tracker = JournalTracker(tmp_path)
    tracker.log(1, {"a": 9.0})
    tracker.log(2, {"a": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert json.loads(lines[0])["value"] == 1.0
    assert [json.loads(line)["value"] for line in lines[1:] if b'"a"' in line] == [2.0]


# --- who gets which tracker -------------------------------------------------------------------------------------------


def test_the_tracker_of_other_ranks_writes_nothing_and_calls_nothing(tmp_path: Path) -> None:
    def write() -> list[Path]:
        raise AssertionError("drawing figures is the main rank's work")

    tracker = open_here(tmp_path, env=DistEnv(1, 1, 2))
    tracker.log(1, {"a": 1.0})
    tracker.log_files(1, write)
    tracker.close("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_the_main_rank_writes_configuration_and_facts_beside_the_journal(tmp_path: Path) -> None:
    info = {"name": "n", "parameters": {"optim.lr": 0.1}, "tags": {"gpus": "8"}}
    open_here(tmp_path, run_info=info, reporting=Reporting("none", "my experiment")).close("FINISHED")
    tracker = open_here(tmp_path, run_info=info, reporting=Reporting("none", "my experiment"))
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\n"
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "tracking": {"uri": "none", "experiment": "my experiment"},
        "attempt": 1,
        "slurm_jobs": [],
        **info,
    }
    assert isinstance(tracker, JournalTracker)
    assert tracker.uploader is None, "`none` means no MLflow"


def test_the_end_waits_for_the_uploader_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_module.logging.getLogger("dist_deeplab"), "propagate", True)
    monkeypatch.setattr(uploader_process, "_END_WAIT_S", 0.01)
    tracker = JournalTracker(tmp_path)
    uploader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tracker.uploader = UploaderProcess(Upload(tmp_path, STORE), process=uploader)
    tracker.close("FINISHED")
    assert "MLflow has not taken everything yet" in caplog.text
    assert "model" not in caplog.text
    assert uploader.poll() is None, "the uploader continues"
    uploader.communicate(b"\n")


def test_a_model_is_waited_for_longer_unless_mlflow_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    monkeypatch.setattr(uploader_process, "_END_WAIT_S", 0.01)
    caplog.set_level("INFO")
    upload = Upload(tmp_path, STORE, log_model=True)
    done = json.dumps({"uri": STORE, "model": "models:/street/3"})
    write = f"import time; time.sleep(0.5); open({str(tmp_path / 'mlflow.json')!r}, 'w').write({done!r})"
    process = subprocess.Popen([sys.executable, "-c", write])
    UploaderProcess(upload, process=process).wait("FINISHED")
    assert "the best checkpoint is in MLflow as models:/street/3" in caplog.text
    (tmp_path / "mlflow.json").write_text(json.dumps({"uri": STORE, "error": "connection refused"}))
    uploader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    UploaderProcess(upload, process=uploader).wait("FINISHED")  # would take ten minutes
    assert "not taken everything yet, the model not either (connection refused)" in caplog.text
    assert f"sync-mlflow {tmp_path}" in caplog.text
    uploader.communicate(b"\n")


def test_the_uploader_is_not_a_rank_and_gets_no_signal_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.update(options, command=command))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    open_here(tmp_path, reporting=Reporting("http://nowhere", "e"))
    assert started["command"][1:] == [
        *("-m", "dist_deeplab.tracking.mlflow.uploader", str(tmp_path), "--uri", "http://nowhere"),
        *("--follow", str(os.getpid())),
    ]
    assert started["start_new_session"]
    assert not any(name.startswith("TORCHELASTIC") for name in started["env"])
    assert started["env"]["PATH"] == os.environ["PATH"]


# --- where MLflow is --------------------------------------------------------------------------------------------------


def test_the_configured_uri_wins_then_the_environments_then_a_sqlite_file_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment")
    assert resolve_uri("http://configured", "runs") == "http://configured"
    assert resolve_uri("none", "runs") == "none"
    assert resolve_uri("", "runs") == "http://from-environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("", "runs") == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert resolve_uri("", "/abs") == "sqlite:////abs/mlflow.db"
