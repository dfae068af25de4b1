"""A trace has the recorded steps, the waits between them and nothing of the first ones."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from dist_deeplab.logs import format_count
from dist_deeplab.training.profiling import profiled


def spans(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def test_the_trace_has_four_steps_and_the_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "rank_0.json.gz"
    seen = []
    for number in profiled(range(20), path, num_steps=20):
        with record_function(f"step {number}"):
            torch.ones(3).sum()
        seen.append(number)
    assert seen == list(range(20))
    names = spans(path)
    assert [name for name in names if name.startswith("step ")] == [f"step {n}" for n in (7, 8, 9, 10)]
    assert names.count("wait for data") == 4


@pytest.mark.parametrize(("left", "recorded"), [(1, [0]), (2, [1]), (3, [2]), (6, [2, 3, 4, 5]), (10, [6, 7, 8, 9])])
def test_near_the_end_of_a_run_fewer_steps_are_recorded_and_it_is_said(
    left: int, recorded: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rank_0.json.gz"
    for number in profiled(range(left), path, num_steps=left):
        with record_function(f"step {number}"):
            torch.ones(3).sum()
    assert [name for name in spans(path) if name.startswith("step ")] == [f"step {n}" for n in recorded]
    assert f"only {format_count(left, 'step is', 'steps are')} left" in caplog.text


def test_a_run_that_is_done_has_no_trace(tmp_path: Path) -> None:
    assert list(profiled(range(0), tmp_path / "rank_0.json.gz", num_steps=0)) == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_path_nothing_is_recorded(tmp_path: Path) -> None:
    assert list(profiled(iter("abc"), None, num_steps=3)) == ["a", "b", "c"]
