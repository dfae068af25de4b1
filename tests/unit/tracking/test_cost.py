"""The cost of a run counts all attempts, and what follows the last log line: evaluation and checkpoint."""

import json
from pathlib import Path

import pytest

from dist_deeplab.tracking import cost as cost_module
from dist_deeplab.tracking.cost import Cost
from dist_deeplab.tracking.tracker import JournalTracker


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(cost_module.time, "monotonic", lambda: clock[0])
    return clock


def test_the_cost_includes_earlier_attempts(now: list[float]) -> None:
    """A second attempt of 30 s on 4 processes, after 100 s on 2."""
    points = {("cost/total_s", 10): 60.0, ("cost/total_s", 20): 100.0, ("cost/device_hours", 20): 200 / 3600}
    cost = Cost(points, world_size=4, running_s=10.0)
    now[0] += 20.0
    assert cost.now() == {"cost/total_s": 130.0, "cost/device_hours": pytest.approx((200 + 120) / 3600)}


def costs(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["value"] for r in records if r.get("key") == "cost/total_s"}


def test_the_cost_of_a_step_includes_its_evaluation_also_of_the_last(now: list[float], tmp_path: Path) -> None:
    tracker = JournalTracker(tmp_path)
    for step in (1, 2, 3, 4):  # as train.py: a log line each 2 steps, an evaluation after it, a checkpoint
        now[0] += 10.0
        if step % 2 == 0:
            tracker.log(step, {"train/loss": 1.0})
            now[0] += 100.0
            tracker.log(step, {"val/mIoU": 0.5})
            now[0] += 1.0
        tracker.log(step, {})
    now[0] += 3.0  # the end waits for its checkpoint
    tracker.close("FINISHED")
    assert costs(tmp_path) == {2: 121.0, 4: 245.0}


def test_a_killed_attempt_counts_up_to_its_last_log_line(now: list[float], tmp_path: Path) -> None:
    tracker = JournalTracker(tmp_path)
    for step in (1, 2):
        now[0] += 10.0
        tracker.log(step, {"train/loss": 1.0})
    again = JournalTracker(tmp_path)
    now[0] += 5.0
    again.log(2, {"val/mIoU": 0.5})
    again.close("FINISHED")
    assert costs(tmp_path) == {1: 10.0, 2: 15.0}


def test_a_sweep_s_cost_is_that_of_its_runs(now: list[float], tmp_path: Path) -> None:
    tracker = JournalTracker(tmp_path)
    now[0] += 10.0
    tracker.log(3, {"val/best_mIoU": 0.5, "cost/total_s": 700.0})
    tracker.close("FINISHED")
    assert costs(tmp_path) == {3: 700.0}
