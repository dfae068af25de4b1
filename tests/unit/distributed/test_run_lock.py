"""A run's folder is held by one run: killed ones free it, live ones elsewhere are seen even without a common flock."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from dist_deeplab.distributed import run_lock
from dist_deeplab.distributed.diagnostics import check_locks
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.run_lock import lock_run
from dist_deeplab.errors import UserError

MARKER = "run.lock.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.5)
    monkeypatch.setattr(run_lock, "_BEAT_S", 0.1)
    monkeypatch.setattr(run_lock, "_SILENT_S", 1.0)


def mark(folder: Path, *, boot: str, age_s: float = 0.0) -> Path:
    """What a run that was killed without warning leaves behind."""
    marker = folder / MARKER
    marker.write_text(json.dumps({"host": "node7", "pid": 4711, "boot": boot}))
    os.utime(marker, (time.time() - age_s,) * 2)
    return marker


def test_a_held_folder_is_refused_with_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    with lock_run(DistEnv(), tmp_path):
        holder = json.loads((tmp_path / MARKER).read_text())
        assert holder["pid"] == os.getpid()
        with (
            pytest.raises(UserError, match=rf"process {os.getpid()} on .*choose another name="),
            lock_run(DistEnv(), tmp_path),
        ):
            pass
        assert (tmp_path / MARKER).exists(), "the refused run left the holder's"
    assert not (tmp_path / MARKER).exists()
    with lock_run(DistEnv(), tmp_path):
        pass


def test_what_a_killed_run_of_this_host_left_costs_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark(tmp_path, boot=run_lock._boot_id())
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for a heartbeat"))
    with lock_run(DistEnv(), tmp_path):
        pass


def _hold_and_wait(folder: Path) -> None:
    with lock_run(DistEnv(), folder):
        time.sleep(600)


def test_kill_9_frees_the_folder_at_once_on_this_host(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold_and_wait, args=(tmp_path,))
    process.start()
    while not (tmp_path / MARKER).exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / MARKER).exists(), "nobody removed it"
    with lock_run(DistEnv(), tmp_path):
        assert json.loads((tmp_path / MARKER).read_text())["pid"] == os.getpid()


def test_a_run_on_another_host_is_seen_by_its_heartbeat_where_locks_do_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre with localflock: the lock is free here although another host holds it."""
    marker = mark(tmp_path, boot="of another kernel")
    beats = SimpleNamespace(sleep=lambda seconds: os.utime(marker), monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr(run_lock, "time", beats)
    with pytest.raises(UserError, match=r"process 4711 on node7.*wait for its end"), lock_run(DistEnv(), tmp_path):
        pass
    with FileLock(tmp_path / "run.lock").acquire(timeout=0):
        pass


@pytest.mark.parametrize("age_s", [0.0, 3600.0])
def test_a_marker_without_heartbeat_never_refuses_a_requeued_job(
    age_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(tmp_path, boot="of another kernel", age_s=age_s)
    clock, waits = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        waits.append(seconds)

    monkeypatch.setattr(run_lock, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], time=time.time))
    with lock_run(DistEnv(), tmp_path):
        assert json.loads((tmp_path / MARKER).read_text())["pid"] == os.getpid()
    assert (sum(waits) >= 1.0) == (age_s == 0.0), "an old one is not waited for"


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_marker_is_not_a_holder(content: str, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(content)
    with lock_run(DistEnv(), tmp_path):
        pass


def test_a_soft_locks_file_of_an_older_version_does_not_refuse(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("4711\nnode7\n")
    with lock_run(DistEnv(), tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_sentence_and_leaves_nothing_that_refuses(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"no file locks .*-o flock.*output_dir="), lock_run(DistEnv(), tmp_path):
        pass
    monkeypatch.undo()
    with lock_run(DistEnv(), tmp_path):
        pass


def test_the_doctor_sees_whether_locks_keep_other_ranks_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = DistEnv(rank=1, local_rank=0, world_size=2)
    with FileLock(tmp_path / "lock"):  # as the main rank does
        assert check_locks(other, tmp_path / "lock").text.startswith("file locks keep others out")
    assert "Lustre: -o flock, not localflock" in check_locks(other, tmp_path / "lock").text
    assert check_locks(DistEnv(), tmp_path / "lock").text.startswith("file locks keep others out")


@pytest.mark.parametrize(("then", "is_alive"), [("ends", False), ("is silent", False), ("beats", True)])
def test_a_holder_on_another_host_is_alive_while_its_heartbeat_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, is_alive: bool
) -> None:
    path, clock = tmp_path / "run.lock.json", [0.0]
    path.write_text(json.dumps({"host": "far", "pid": 1, "boot": "of another host"}))

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if then == "ends":
            path.unlink(missing_ok=True)
        elif then == "beats":
            now = path.stat().st_mtime_ns + 10**9
            os.utime(path, ns=(now, now))

    fake = SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0], time=time.time)
    monkeypatch.setattr(run_lock, "time", fake)
    assert run_lock._Holder(path).is_alive_elsewhere() == is_alive
