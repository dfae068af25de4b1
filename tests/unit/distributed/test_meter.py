"""The meter counts steps and the waits for data, and leaves pauses out; a clock made of numbers stands in for time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_deeplab.distributed import meter as meter_module
from dist_deeplab.distributed.meter import Meter, peak_memory_bytes

CPU = torch.device("cpu")


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter_module.time, "perf_counter", clock.perf_counter)
    return clock


def slow_source(clock: Clock, waits: list[float]) -> Iterator[int]:
    for number, wait in enumerate(waits):
        clock.now += wait
        yield number


def test_the_items_come_through_unchanged() -> None:
    assert list(Meter().timed(["a", "b"])) == ["a", "b"]
    assert list(Meter().timed([])) == []


def test_steps_and_waits_for_data_are_means_over_the_window(clock: Clock) -> None:
    meter = Meter()
    for _ in meter.timed(slow_source(clock, [0.5, 0.25, 0.75])):
        clock.now += 2.0
    values = meter.pop(images_per_step=10, device=CPU)
    assert values["time/step_s"] == (3 * 2.0 + 1.5) / 3
    assert values["time/data_s"] == 0.5
    assert values["images_per_s"] == 3 * 10 / 7.5


def test_pauses_are_left_out(clock: Clock) -> None:
    meter = Meter()
    for _ in meter.timed(slow_source(clock, [1.0, 1.0])):
        clock.now += 1.0
        with meter.paused():
            clock.now += 500.0
    assert meter.pop(images_per_step=1, device=CPU)["time/step_s"] == 2.0


def test_each_window_starts_from_zero(clock: Clock) -> None:
    meter = Meter()
    source = meter.timed(slow_source(clock, [9.0, 0.25, 0.75]))
    next(source)
    meter.pop(images_per_step=1, device=CPU)
    for _ in source:
        clock.now += 1.0
    values = meter.pop(images_per_step=1, device=CPU)
    assert values["time/data_s"] == 0.5
    assert values["time/step_s"] == 1.5


def test_a_window_of_no_time_gives_finite_numbers(clock: Clock) -> None:
    assert all(abs(value) < 1e12 for value in Meter().pop(images_per_step=1, device=CPU).values())


def test_peak_memory_on_the_cpu_is_the_kernels_high_water_mark() -> None:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    assert peak_memory_bytes(CPU) == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_mfu_is_the_share_of_what_the_devices_could_do_at_their_peak(clock: Clock) -> None:
    meter = Meter()
    meter.start(images_per_s_at_peak=10.0)
    for _ in meter.timed(slow_source(clock, [0.0, 0.0])):
        clock.now += 2.0
    assert meter.pop(images_per_step=8, device=CPU)["mfu"] == pytest.approx(4.0 / 10.0)
    assert "mfu" not in Meter().pop(images_per_step=8, device=CPU)
