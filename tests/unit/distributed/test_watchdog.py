"""The watchdog ends a process that hangs or waits for a rank that failed, and names the ranks that hold up the rest."""

import json
import logging
import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_deeplab.distributed import watchdog
from dist_deeplab.distributed.heartbeat import Heartbeat, Progress, find_stalled
from dist_deeplab.distributed.process_group import DistEnv
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


def test_a_run_that_hangs_is_ended_with_its_stacks_and_one_that_advances_is_not(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("dist_deeplab"), "propagate", True)
    ended = threading.Event()
    exit_codes: list[int] = []

    def end(code: int) -> None:
        exit_codes.append(code)
        ended.set()
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    progress = Progress()
    with watched(DistEnv(0, 0, 2, "slurm"), store, progress, StopRequest(), timeout_s=0.4, logs=tmp_path):
        for _ in range(15):
            progress.begin("in a step")
            assert not ended.wait(0.1)
        progress.begin("waiting for data")
        assert ended.wait(30)
    assert exit_codes == [1]
    assert "no heartbeat from rank 1" in caplog.text
    stacks = (tmp_path / "rank_0.stacks").read_text()
    assert "rank 0 on" in stacks
    assert "waiting for data" in stacks
    assert "test_watchdog.py" in stacks


def test_a_stop_request_reaches_the_other_ranks(store: dist.Store, tmp_path: Path) -> None:
    asked, hears = StopRequest(), StopRequest()
    heard = threading.Event()
    hears.hear = lambda reason: (StopRequest.hear(hears, reason), heard.set())  # type: ignore[method-assign]
    with (
        watched(DistEnv(0, 0, 2, "slurm"), store, Progress(), asked, timeout_s=2, logs=tmp_path),
        watched(DistEnv(1, 1, 2, "slurm"), store, Progress(), hears, timeout_s=2, logs=tmp_path),
    ):
        asked.hear("SIGUSR1")
        assert heard.wait(30)
    assert hears.reason == "SIGUSR1"


def test_a_rank_whose_torchrun_is_gone_asks_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    heard = threading.Event()
    stop.hear = lambda reason: (StopRequest.hear(stop, reason), heard.set())  # type: ignore[method-assign]
    with watched(DistEnv(0, 0, 1, "torchrun"), None, Progress(), stop, timeout_s=2, logs=tmp_path):
        monkeypatch.setattr(watchdog.os, "getppid", lambda: 1)
        assert heard.wait(30)
    assert stop.reason == "torchrun is gone"


def test_a_heartbeat_survives_the_store(tmp_path: Path) -> None:
    dog = watchdog.Watchdog(DistEnv(), None, Progress(), StopRequest(), timeout_s=9, logs=tmp_path)
    own = dog.heartbeat()
    assert Heartbeat(**json.loads(json.dumps(vars(own)))) == own
