"""The simulation of communication, by hand on small cases, and against real ranks."""

import json
from pathlib import Path

import benchmark
import pytest
from benchmarks.network import BUCKET, FIRST_BUCKET, Event, Network, simulate
from benchmarks.timeline import median_events, slowest_events

from tests.unit.tools.test_benchmark import run_benchmark

LINK = Network(latency_s=1.0, bandwidth=1e6)


def test_a_collective_costs_messages_and_bytes() -> None:
    assert LINK.all_reduce_s(0, 1) == LINK.all_gather_s(0, 1) == 0
    assert LINK.all_reduce_s(0, 2) == 2  # there and back
    assert LINK.all_reduce_s(0, 8) == 6  # a tree of depth 3, twice
    assert LINK.all_reduce_s(80_000_000, 8) == pytest.approx(2 * 7 + 2 * 7 / 8 * 80)  # a ring
    assert LINK.all_gather_s(1_000_000, 8) == pytest.approx(3 + 7)


def test_batch_norm_is_waited_for_and_gradients_overlap() -> None:
    events = [
        Event("gather", 10, 0),
        Event("reduce", 20, 0),
        Event("gradient", 0, FIRST_BUCKET),
        Event("nothing", 30, 0),
    ]
    step = simulate(events, 5, LINK, 2)
    assert step.compute_s == 65
    assert step.batch_norm_s == 1 + 2
    assert step.gradients_s == 0  # 3 s of communication under 30 s of compute
    assert simulate(events, 5, LINK, 1).seconds == 65


def test_what_compute_does_not_cover_is_exposed() -> None:
    events = [Event("gradient", 10, FIRST_BUCKET), Event("nothing", 1, 0)]
    step = simulate(events, 0, LINK, 2)
    assert step.gradients_s == pytest.approx(LINK.all_reduce_s(FIRST_BUCKET, 2) - 1)


def test_gradients_travel_in_buckets_a_small_one_first() -> None:
    one = Event("gradient", 0, FIRST_BUCKET)
    step = simulate([one] * (1 + BUCKET // FIRST_BUCKET + 1), 0, LINK, 2)
    expected = sum(LINK.all_reduce_s(size, 2) for size in (FIRST_BUCKET, BUCKET, FIRST_BUCKET))
    assert step.gradients_s == pytest.approx(expected)


def test_batch_norm_waits_for_a_bucket_under_way() -> None:
    events = [Event("gradient", 0, FIRST_BUCKET), Event("reduce", 0, 0)]
    step = simulate(events, 0, LINK, 2)
    assert step.batch_norm_s == pytest.approx(LINK.all_reduce_s(FIRST_BUCKET, 2) + 2)
    assert step.gradients_s == 0


def test_median_and_slowest_events() -> None:
    def runs(*seconds: float) -> list[list[Event]]:
        return [[Event("gather", value, 4), Event("nothing", 1, 0)] for value in seconds]

    assert median_events(runs(1, 9, 2)) == [Event("gather", 2, 4), Event("nothing", 1, 0)]
    assert slowest_events([runs(1, 5), runs(3, 1)]) == [Event("gather", 4, 4), Event("nothing", 1, 0)]


def test_scaling_simulates_and_checks_against_real_ranks(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    done = run_benchmark("scaling", "--crop", 33, "--images", 1, "--ranks", 1, 4, "--check", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    alone, four, real = json.loads(file.read_text())["rows"]
    assert alone["efficiency"] == 1
    assert four["efficiency"] == pytest.approx(alone["step_ms"] / four["step_ms"])  # each measured: any load between
    assert four["step_ms"] == pytest.approx(four["compute_ms"] + four["batch_norm_ms"] + four["gradients_ms"])
    assert four["batch_norm_ms"] > 0
    assert 0 < four["frozen_efficiency"] <= 1
    assert real["what"] == "2 real gloo"
    assert real["measured_ms"] > 0 and real["measured_over_simulated"] > 0


def test_an_impossible_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["scaling", "--bandwidth-gbit", "0"]) == 2
    assert "is positive" in capsys.readouterr().err
