"""A trace has the recorded steps, the waits between them and nothing of the first ones."""

import gzip
import json
from pathlib import Path

import torch
from torch.profiler import record_function

from dist_deeplab.training.profiling import profiled


def spans(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def test_the_trace_has_four_steps_and_the_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "rank_0.json.gz"
    seen = []
    for number in profiled(range(20), path):
        with record_function(f"step {number}"):
            torch.ones(3).sum()
        seen.append(number)
    assert seen == list(range(20))
    names = spans(path)
    assert [name for name in names if name.startswith("step ")] == [f"step {n}" for n in (7, 8, 9, 10)]
    assert names.count("wait for data") == 4


def test_a_short_run_has_no_trace(tmp_path: Path) -> None:
    assert list(profiled(range(3), tmp_path / "rank_0.json.gz")) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_without_a_path_nothing_is_recorded(tmp_path: Path) -> None:
    assert list(profiled(iter("abc"), None)) == ["a", "b", "c"]
