"""Which run in which store a folder has: copies, deleted runs, several stores, several uploaders, arbitrary users."""

import getpass
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from filelock import FileLock
from mlflow.entities import Run

from dist_deeplab.commands import sync_mlflow
from dist_deeplab.tracking.mlflow import private
from dist_deeplab.tracking.mlflow import uploader as uploader_module
from dist_deeplab.tracking.mlflow.pages import tables_of
from dist_deeplab.tracking.mlflow.private import private_folder
from dist_deeplab.tracking.mlflow.state import UploadState
from dist_deeplab.tracking.mlflow.store import store_lock
from dist_deeplab.tracking.mlflow.uploader import Uploader, upload_until_done
from dist_deeplab.tracking.run_files import write_run_file
from tests.conftest import command_environ


@pytest.fixture(autouse=True)
def _environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def runs(tmp_path: Path, empty_store: Path) -> Path:
    """A folder of runs with a store, and one run `a` that has ended."""
    return make_runs(tmp_path / "runs", empty_store)


def make_runs(folder: Path, empty_store: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    shutil.copy(empty_store, folder / "mlflow.db")
    info = {"name": "a", "parameters": {"max_steps": 4}, "description": "as it was written"}
    write_run_file(folder / "a", uri=f"sqlite:///{folder}/mlflow.db", experiment="e", attempt=0, run_info=info)
    append(folder / "a", {"time": 1.0, "status": "RUNNING", "attempt": 0}, point(1))
    append(folder / "a", {"time": 9.0, "status": "FINISHED", "attempt": 0})
    return folder


def append(folder: Path, *records: dict[str, Any]) -> None:
    with (folder / "metrics.jsonl").open("a") as journal:
        journal.writelines(json.dumps(record) + "\n" for record in records)


def point(step: int) -> dict[str, Any]:
    return {"step": step, "time": 2.0, "key": "train/loss", "value": 1 / step, "attempt": 0}


def send(folder: Path, uri: str = "") -> bool:
    return upload_until_done(Uploader(folder, uri=uri), is_running=lambda: False, give_up_s=0.0)


def client(runs: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")


def runs_in(runs: Path) -> list[Run]:
    return list(client(runs).search_runs([e.experiment_id for e in client(runs).search_experiments()]))


# --- copies and several stores ----------------------------------------------------------------------------------------


def test_a_copy_elsewhere_goes_to_the_store_beside_it(runs: Path, tmp_path: Path, empty_store: Path) -> None:
    assert send(runs / "a")
    copy = tmp_path / "colleague"
    copy.mkdir()
    shutil.copytree(runs / "a", copy / "a")
    append(copy / "a", point(3))
    assert send(copy / "a")
    assert [run.data.metrics["train/loss"] for run in runs_in(runs)] == [1.0], "the original is as it was"
    assert [run.data.metrics["train/loss"] for run in runs_in(copy)] == [1 / 3]


def test_a_copy_in_the_same_store_gets_a_run_of_its_own(runs: Path) -> None:
    assert send(runs / "a")
    shutil.copytree(runs / "a", runs / "b")
    append(runs / "b", point(3))
    for _ in range(2):
        assert send(runs / "b")
    assert sorted(run.data.metrics["train/loss"] for run in runs_in(runs)) == [1 / 3, 1.0]


def test_a_folder_that_was_moved_keeps_its_run(runs: Path) -> None:
    assert send(runs / "a")
    (runs / "a").rename(runs / "renamed")
    append(runs / "renamed", point(3))
    assert send(runs / "renamed")
    assert [run.data.metrics["train/loss"] for run in runs_in(runs)] == [1 / 3]


def test_another_store_and_back_makes_one_run_in_each(runs: Path, tmp_path: Path, empty_store: Path) -> None:
    other = tmp_path / "other.db"
    shutil.copy(empty_store, other)
    assert send(runs / "a")
    assert send(runs / "a", f"sqlite:///{other}")
    append(runs / "a", point(3))
    assert send(runs / "a")
    assert send(runs / "a", f"sqlite:///{other}")
    for found in (runs_in(runs), mlflow.MlflowClient(f"sqlite:///{other}").search_runs(["1"])):
        assert [run.data.metrics["train/loss"] for run in found] == [1 / 3]


def test_the_same_store_under_another_name_has_one_run(runs: Path) -> None:
    assert send(runs / "a")
    append(runs / "a", point(3))
    assert send(runs / "a", f"sqlite:///{runs}/../runs/mlflow.db")
    assert [run.data.metrics["train/loss"] for run in runs_in(runs)] == [1 / 3]


def test_the_state_of_an_earlier_version_is_read(runs: Path) -> None:
    """As commit 849af79 wrote it, with a password taken out of the address."""
    old = {"run_id": "7f", "experiment_id": "1", "sent_bytes": 9, "sent_system": {}, "status": None, "described": 0}
    (runs / "a" / "mlflow.json").write_text(json.dumps({**old, "uri": "http://me:***@host", "model": "", "error": ""}))
    state = UploadState(runs / "a", "http://me:secret@host")
    assert (state["run_id"], state["sent_bytes"], state["described"], state["status"]) == ("7f", 9, 0, "")


# --- deleted runs -----------------------------------------------------------------------------------------------------


def sync(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "dist_deeplab", "sync-mlflow", *map(str, arguments)]
    done = subprocess.run(command, env=command_environ(), capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout


def test_a_deleted_run_says_so_and_new_run_sends_all_again(runs: Path) -> None:
    assert send(runs / "a")
    client(runs).delete_run(runs_in(runs)[0].info.run_id)
    append(runs / "a", point(3))
    assert not send(runs / "a")
    error = UploadState(runs / "a")["error"]
    assert "was deleted in sqlite:///" in error and f"sync-mlflow --new-run {runs / 'a'}" in error
    code, output = sync("--new-run", runs / "a")
    assert (code, output.splitlines()[0]) == (0, f"{runs / 'a'}: sent to sqlite:///{runs}/mlflow.db")
    (run,) = runs_in(runs)
    assert (run.data.metrics["train/loss"], run.info.status) == (1 / 3, "FINISHED")
    assert send(runs / "a") and len(runs_in(runs)) == 1


def test_a_run_that_is_restored_is_continued(runs: Path) -> None:
    assert send(runs / "a")
    run_id = runs_in(runs)[0].info.run_id
    client(runs).delete_run(run_id)
    append(runs / "a", point(3))
    assert not send(runs / "a")
    client(runs).restore_run(run_id)
    assert send(runs / "a")
    assert runs_in(runs)[0].data.metrics["train/loss"] == 1 / 3


def test_a_deleted_experiment_says_how_to_get_it_back(runs: Path) -> None:
    experiment = client(runs).create_experiment("e")
    client(runs).delete_experiment(experiment)
    assert not send(runs / "a")
    assert f"`mlflow experiments restore --experiment-id {experiment}`" in UploadState(runs / "a")["error"]
    client(runs).restore_experiment(experiment)
    assert send(runs / "a")


# --- several uploaders ------------------------------------------------------------------------------------------------


def test_sync_takes_over_from_an_uploader_that_lingers(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store took nothing when the run ended; now it does, and the lingering process would try in ten minutes."""
    monkeypatch.setattr(uploader_module, "_RETRY_S", (600.0,))
    monkeypatch.setattr(sys, "argv", ["uploader", str(runs / "a"), "--follow", str(os.getpid() + 10_000_000)])
    monkeypatch.setattr(os, "nice", lambda by: 0)
    experiment = client(runs).create_experiment("e")
    client(runs).delete_experiment(experiment)
    lingering = threading.Thread(target=lambda: uploader_module._send(arguments, lock), daemon=True)
    arguments, lock = uploader_module._parse_arguments(), FileLock(runs / "a" / "mlflow.lock", thread_local=False)
    lock.acquire(timeout=0)
    lingering.start()
    deadline = time.monotonic() + 60
    while lock.is_locked:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert UploadState(runs / "a")["error"]
    client(runs).restore_experiment(experiment)
    assert sync(runs / "a")[0] == 0
    assert [run.data.metrics["train/loss"] for run in runs_in(runs)] == [1.0]
    assert lingering.is_alive()


def test_while_another_process_sends_sync_says_that_and_not_an_old_error(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    UploadState(runs / "a", f"sqlite:///{runs}/mlflow.db").save(error="an old error")
    monkeypatch.setattr(subprocess, "run", _with_short_handover(subprocess.run))
    with FileLock(runs / "a" / "mlflow.lock"):
        assert sync_mlflow.main([str(runs / "a")]) == 1
    output = capsys.readouterr().out
    assert "another process is sending" in output and "an old error" not in output


def _with_short_handover(run: Any) -> Any:
    def call(command: list[str], **options: Any) -> Any:
        program = (
            "import sys; from dist_deeplab.tracking.mlflow import uploader; uploader._HANDOVER_S = 0.1; "
            "sys.exit(uploader.main())"
        )
        return run([command[0], "-c", program, *command[3:]], **options)

    return call


# --- how a run ended --------------------------------------------------------------------------------------------------


def test_a_requeued_run_is_scheduled_and_says_so_until_it_continues(runs: Path) -> None:
    note = "requeued, step 2 of 4"
    append(runs / "a", {"time": 10.0, "status": "KILLED", "attempt": 0, "note": note})
    (runs / "a" / "metrics.jsonl").write_text((runs / "a" / "metrics.jsonl").read_text().replace("FINISHED", "RUNNING"))
    assert send(runs / "a")
    (run,) = runs_in(runs)
    assert run.info.status == "SCHEDULED"
    assert run.data.tags["state"] == note
    assert run.data.tags["mlflow.note.content"] == f"**{note}**\n\nas it was written"
    client(runs).set_tag(run.info.run_id, "mlflow.note.content", f"**{note}**\n\nthe user's own words")
    info = {"name": "a", "parameters": {"max_steps": 4}, "description": "as it was written"}
    write_run_file(runs / "a", uri="", experiment="e", attempt=1, run_info=info)
    append(runs / "a", {"time": 11.0, "status": "RUNNING", "attempt": 1})
    Uploader(runs / "a").send_new()
    assert runs_in(runs)[0].info.status == "RUNNING"
    append(runs / "a", {"time": 12.0, "status": "FINISHED", "attempt": 1, "note": "finished, step 4 of 4"})
    assert send(runs / "a")
    (run,) = runs_in(runs)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"] == "the user's own words"
    assert run.data.tags["state"] == "not stopped"


def test_the_tables_of_a_sqlite_store_are_listed_without_opening_mlflow(runs: Path) -> None:
    assert tables_of(f"{runs}/mlflow.db", "http://h") == []
    assert send(runs / "a")
    (line,) = tables_of(f"{runs}/mlflow.db", "http://h")
    assert line.startswith("e (1 run): http://h/#/experiments/1/runs?") and "best_mIoU" in line
    assert tables_of(f"{runs}/missing.db", "http://h") == []
    assert not (runs / "missing.db").exists()


# --- users ------------------------------------------------------------------------------------------------------------


def test_a_user_without_a_name_is_a_number(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", no_entry)
    assert send(runs / "a")
    assert runs_in(runs)[0].data.tags["mlflow.user"] == str(os.getuid())


def test_the_private_folder_is_this_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert private_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "state" / "dist_deeplab").rmdir()
    (tmp_path / "state" / "dist_deeplab").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(private.tempfile, "gettempdir", lambda: str(tmp_path))
    assert private_folder() == tmp_path / f"dist_deeplab-{os.getuid()}", "not where a link leads"
    private_folder().rmdir()
    (tmp_path / f"dist_deeplab-{os.getuid()}").write_text("taken")
    with pytest.raises(OSError, match="set XDG_STATE_HOME"):
        private_folder()


def test_a_server_needs_no_lock_and_a_database_s_has_a_time_limit(tmp_path: Path) -> None:
    with store_lock("http://host:5000"), store_lock("http://host:5000"):
        pass
    lock = store_lock("postgresql://host/mlflow")
    assert isinstance(lock, FileLock)
    assert Path(lock.lock_file).parent == private_folder()
    assert 0 < lock.timeout < 600


def test_many_tasks_of_an_array_job_on_one_sqlite_file_are_warned(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dist_deeplab.tracking import tracker

    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    tracker._note_store(runs / "a", f"sqlite:///{runs}/mlflow.db")
    assert caplog.text == ""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    tracker._note_store(runs / "a", f"sqlite:///{runs}/mlflow.db")
    assert "share one SQLite file" in caplog.text


@pytest.mark.parametrize(("others", "beside"), [([], ""), (["b"], " or {folder}/b")])
def test_folders_without_a_run_are_named_with_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str], beside: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        sync_mlflow.main([str(tmp_path / name) for name in ("a", *others)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"cannot find run.json in {tmp_path / 'a'}{beside.format(folder=tmp_path)}; name the folders of runs" in said
