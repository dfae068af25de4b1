"""The watchdog ends a process that hangs or waits for a rank that failed, and names the ranks that hold up the rest."""

import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dist_deeplab.distributed import heartbeat, watchdog
from dist_deeplab.distributed.failure import Failure, publish_failure
from dist_deeplab.distributed.heartbeat import (
    Heartbeat,
    Progress,
    find_stalled,
    publish_heartbeat,
    wait_for_all,
    watchdog_store,
)
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import Session
from dist_deeplab.distributed.stop_request import StopRequest
from dist_deeplab.distributed.watchdog import watched


def beat(rank: int, *, tick: int = 5, progress: int = 10, waits: bool = True, phase: str = "in a step") -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", tick, progress, phase, "step.py:60 __call__", waits)


def later(*beats: Heartbeat) -> tuple[dict[int, Heartbeat], dict[int, Heartbeat]]:
    """The heartbeats at two moments: tick 0 is that of a rank that publishes none any more."""
    before = {s.rank: s for s in beats}
    after = {s.rank: s if s.tick == 0 else Heartbeat(**{**vars(s), "tick": s.tick + 2}) for s in beats}
    return before, after


def test_a_rank_without_a_new_heartbeat_is_named_first() -> None:
    said = find_stalled(*later(beat(0), beat(1, tick=0), beat(2, progress=3)), 3)
    assert said.startswith("no heartbeat from rank 1 on node1")
    assert "rank 2" not in said


def test_a_rank_that_never_published_is_named() -> None:
    assert find_stalled(*later(beat(0), beat(2)), 3) == "no heartbeat from rank 1"


def test_a_rank_that_is_behind_is_named_with_what_it_does() -> None:
    said = find_stalled(*later(beat(0), beat(1, progress=9, phase="waiting for data"), beat(2)), 3)
    assert said == "the others wait for rank 1 on node1, waiting for data, in step.py:60 __call__"


def test_a_rank_that_does_not_wait_while_the_others_do_is_named() -> None:
    said = find_stalled(*later(beat(0), beat(1), beat(2, waits=False)), 3)
    assert said.startswith("not waiting for others: rank 2 on node2")


def test_where_all_are_alike_all_are_named() -> None:
    said = find_stalled(*later(beat(0), beat(1)), 2)
    assert "rank 0" in said
    assert "rank 1" in said


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


class Ended(Exception):
    """Stands in for the end of the process."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the watchdog has ended the process, which is not ended."""
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    event = threading.Event()

    def end(code: int) -> None:
        assert code == 1
        event.set()
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    return event


def test_a_run_that_hangs_is_ended_with_its_stacks_and_one_that_advances_is_not(
    store: dist.Store, tmp_path: Path, ended: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    with watched(DistEnv(0, 0, 2, "slurm"), store, progress, StopRequest(), timeout_s=2, logs=tmp_path):
        for _ in range(30):  # longer than the limit in all, and each far below it
            progress.begin("in a step")
            assert not ended.wait(0.1)
        progress.begin("waiting for data")
        assert ended.wait(30)
    assert "no heartbeat from rank 1" in caplog.text
    stacks = (tmp_path / "rank_0.stacks").read_text()
    assert "rank 0 on" in stacks
    assert "waiting for data" in stacks
    assert "test_watchdog.py" in stacks
    for file in (tmp_path / "flight_recorder").glob("*/rank_0"):
        assert "entries" in pickle.loads(file.read_bytes())
    assert list((tmp_path / "flight_recorder").glob("*/rank_0"))


def test_each_step_has_the_whole_time_limit_though_it_outlasts_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 7.5 s, looked at every 2.5 s, under a limit of 10 s; the step after the last one never ends."""
    progress, now, ended_at = Progress(), [0.0], []
    dog = watchdog.Watchdog(DistEnv(), None, progress, StopRequest(), timeout_s=10, logs=None)

    def tick(_: float) -> bool:
        now[0] += 2.5
        if now[0] <= 60 and now[0] % 7.5 == 0:
            progress.begin("in a step")
        return bool(ended_at) or now[0] > 120

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(dog, "over", SimpleNamespace(wait=tick))
    monkeypatch.setattr(dog, "give_up", lambda _: ended_at.append(now[0]))
    dog.check()
    assert ended_at == [72.5], "the last step began at 60 s, and more than 10 s have passed since"


def test_once_watching_is_over_no_stacks_are_due_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be printed minutes later, of a process that does something else and is well."""
    calls: list[str] = []
    armed = threading.Event()
    monkeypatch.setattr(watchdog, "_TICK_S", 0.02)
    monkeypatch.setattr(
        watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: (calls.append("due"), armed.set())
    )
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    with watched(DistEnv(), None, Progress(), StopRequest(), timeout_s=600):
        assert armed.wait(60)
    assert calls[-1] == "cancelled"


@pytest.mark.parametrize("problem", ["disk full", "not a folder"])
def test_a_run_that_hangs_is_ended_though_its_log_folder_cannot_be_written(
    tmp_path: Path, ended: threading.Event, capfd: pytest.CaptureFixture[str], problem: str
) -> None:
    logs = tmp_path / "logs"
    if problem == "disk full":
        logs.mkdir()
        (logs / "rank_0.stacks").symlink_to("/dev/full")
        (logs / "flight_recorder").symlink_to("/dev/full")
    else:
        logs.write_text("")
    with watched(DistEnv(), None, Progress(), StopRequest(), timeout_s=0.4, logs=logs):
        assert ended.wait(30)
    printed = capfd.readouterr().err
    assert "no progress for 0 s: rank 0 on" in printed
    assert "test_watchdog.py" in printed


def test_a_rank_that_waits_for_one_that_failed_is_ended(
    store: dist.Store,
    tmp_path: Path,
    ended: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(watchdog, "_AFTER_FAILURE_S", 0.5)
    monkeypatch.setattr(watchdog, "_TICK_S", 0.1)
    with watched(DistEnv(0, 0, 2, "slurm"), store, Progress(), StopRequest(), timeout_s=600, logs=tmp_path):
        assert not ended.wait(1)
        publish_failure(store, Failure(1, "node1", "no data"))
        assert ended.wait(30)
    assert "rank 0 ends: rank 1 on node1 failed: no data" in caplog.text


def test_a_failure_of_its_own_does_not_end_a_rank_before_it_is_printed(
    store: dist.Store, tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_AFTER_FAILURE_S", 0.2)
    monkeypatch.setattr(watchdog, "_TICK_S", 0.1)
    publish_failure(store, Failure(0, "node0", "no data"))
    with watched(DistEnv(0, 0, 2, "slurm"), store, Progress(), StopRequest(), timeout_s=600, logs=tmp_path):
        assert not ended.wait(1.5)


# --- ranks that are far apart -----------------------------------------------------------------------------------------


def wait_in_threads(store: dist.Store, num_ranks: int) -> tuple[list[threading.Thread], list[Progress]]:
    marks = [Progress() for _ in range(num_ranks)]
    arrived, heartbeats = dist.PrefixStore("wait_1", store), watchdog_store(store)
    threads = [
        threading.Thread(target=wait_for_all, args=(DistEnv(rank, rank, 3, "slurm"), arrived, heartbeats, marks[rank]))
        for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    return threads, marks


def test_ranks_wait_for_a_late_one_and_make_progress_while_it_publishes_heartbeats(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_ASK_S", 0.05)
    threads, marks = wait_in_threads(store, 2)
    for tick in range(1, 6):
        before = marks[0].count
        publish_heartbeat(watchdog_store(store), beat(2, tick=tick))
        wait_until(lambda before=before: marks[0].count > before)
    silent = marks[0].count
    threads[0].join(0.5)
    assert threads[0].is_alive()
    assert marks[0].count <= silent + 1, "a rank without heartbeats is no progress"
    wait_for_all(DistEnv(2, 2, 3, "slurm"), dist.PrefixStore("wait_1", store), watchdog_store(store), Progress())
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_wait_is_for_itself(store: dist.Store) -> None:
    sessions = [Session(DistEnv(rank, rank, 2, "slurm"), store.clone()) for rank in range(2)]
    other = threading.Thread(target=lambda: [sessions[1].wait_for_all() for _ in range(3)])
    other.start()
    for _ in range(3):
        sessions[0].wait_for_all()
    other.join(20)
    assert not other.is_alive()


def test_a_stop_request_reaches_the_other_ranks(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.05)
    asked, hears = StopRequest(), StopRequest()
    heard = threading.Event()
    hears.hear = lambda reason: (StopRequest.hear(hears, reason), heard.set())  # type: ignore[method-assign]
    with (
        watched(DistEnv(0, 0, 2, "slurm"), store, Progress(), asked, timeout_s=600, logs=tmp_path),
        watched(DistEnv(1, 1, 2, "slurm"), store, Progress(), hears, timeout_s=600, logs=tmp_path),
    ):
        asked.hear("SIGUSR1")
        assert heard.wait(30)
    assert hears.reason == "SIGUSR1"


def test_a_rank_whose_torchrun_is_gone_asks_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.05)
    stop = StopRequest()
    heard = threading.Event()
    stop.hear = lambda reason: (StopRequest.hear(stop, reason), heard.set())  # type: ignore[method-assign]
    with watched(DistEnv(0, 0, 1, "torchrun"), None, Progress(), stop, timeout_s=600, logs=tmp_path):
        monkeypatch.setattr(watchdog.os, "getppid", lambda: -1)  # not 1: in a container pytest's own parent may be that
        assert heard.wait(30)
    assert stop.reason == "torchrun is gone"


def test_a_heartbeat_survives_the_store(tmp_path: Path) -> None:
    dog = watchdog.Watchdog(DistEnv(), None, Progress(), StopRequest(), timeout_s=9, logs=tmp_path)
    own = dog.heartbeat()
    assert Heartbeat(**json.loads(json.dumps(vars(own)))) == own


def test_a_rank_that_waits_for_one_that_is_gone_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its watchdog would never end it; as long as new heartbeats come, it does make progress."""
    store, progress, clock, beats = dist.HashStore(), Progress(), [0.0], 3

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] > 600:
            raise TimeoutError
        beat = min(int(clock[0] // heartbeat._ASK_S), beats)  # then rank 1 is silent
        publish_heartbeat(store, Heartbeat(1, "host", beat, 1, "evaluating", "a.py:1", False))

    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    with pytest.raises(TimeoutError):
        heartbeat.wait_for_all(DistEnv(0, 0, 2), dist.PrefixStore("arrived", store), store, progress)
    assert 1 < progress.count <= 1 + beats + 1


@pytest.mark.parametrize("limit_s", [1.0, 4.0, 1800.0])
def test_a_hang_is_noticed_within_a_quarter_more_than_its_limit(limit_s: float) -> None:
    watch = watchdog.Watchdog(DistEnv(), None, Progress(), StopRequest(), timeout_s=limit_s, logs=None)
    assert watch.tick_s <= limit_s / 4


def test_each_wait_is_for_arrivals_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    own, other = (Session(DistEnv(rank, rank, 2), store) for rank in (0, 1))
    thread = threading.Thread(target=other.wait_for_all)
    thread.start()
    own.wait_for_all()
    thread.join(60)

    def never(seconds: float) -> None:
        raise TimeoutError

    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(sleep=never, monotonic=time.monotonic))
    with pytest.raises(TimeoutError):
        own.wait_for_all()  # the other rank has not arrived a second time
