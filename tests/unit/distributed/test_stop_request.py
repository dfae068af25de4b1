"""A signal becomes a flag and nothing else; a second one ends the process."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_deeplab.distributed import session
from dist_deeplab.distributed import stop_request as preemption
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.stop_request import StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    """An installed request; the handlers from before come back."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield StopRequest().install()
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_code_after(*numbers: int, apart_s: float = 0.0) -> int | None:
    """How a process ends that catches these signals, one after the other, and then leaves with 75."""

    def run() -> None:
        clock = [1000.0]
        preemption.time.monotonic = lambda: clock[0]
        stop = StopRequest().install()
        for number in numbers:
            os.kill(os.getpid(), number)
            clock[0] += apart_s
        os._exit(75 if stop else 0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_without_a_signal_no_stop_is_requested(stop: StopRequest) -> None:
    assert not stop
    assert exit_code_after() == 0


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_the_flag_and_the_process_continues(number: signal.Signals, stop: StopRequest) -> None:
    os.kill(os.getpid(), number)
    assert stop
    assert stop.signal_number == number


@pytest.mark.parametrize("number", NUMBERS)
def test_one_signal_does_not_end_a_process(number: signal.Signals) -> None:
    assert exit_code_after(number) == 75


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", NUMBERS)
def test_a_second_ctrl_c_or_sigterm_later_ends_the_process_at_once(
    first: signal.Signals, second: signal.Signals
) -> None:
    assert exit_code_after(first, second, apart_s=6.0) == -second


@pytest.mark.parametrize("number", NUMBERS)
def test_the_same_signal_passed_on_by_srun_and_torchrun_counts_once(number: signal.Signals) -> None:
    assert exit_code_after(number, number, number, apart_s=1.0) == 75


@pytest.mark.parametrize("first", NUMBERS)
def test_slurms_usr1_never_ends_a_process_however_often_it_comes(first: signal.Signals) -> None:
    assert exit_code_after(first, signal.SIGUSR1, signal.SIGUSR1, apart_s=6.0) == 75


def test_before_install_signals_are_left_alone() -> None:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    stop = StopRequest()
    assert {number: signal.getsignal(number) for number in NUMBERS} == before
    assert not stop


def test_a_time_limit_asks_to_stop_and_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    stop.set_deadline(10.0)
    assert not stop
    now[0] += 11
    assert stop
    assert stop.reason == "max_hours"
    assert stop.ends_launch


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR1, True)])
def test_only_slurms_warning_ends_the_launch_for_good(number: signal.Signals, ends: bool, stop: StopRequest) -> None:
    """torchrun ends workers by SIGTERM to start them again with more or fewer nodes."""
    os.kill(os.getpid(), number)
    assert stop.ends_launch == ends


def test_slurms_warning_after_a_sigterm_ends_the_launch(stop: StopRequest) -> None:
    """The job's time is up soon, so torchrun must not start again what it ended by SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.reason == "SIGUSR1"
    assert stop.ends_launch


def test_another_ranks_request_is_taken_over() -> None:
    stop = StopRequest()
    stop.hear("SIGTERM")
    assert stop
    stop.hear("max_hours")
    assert stop.reason == "SIGTERM"


@pytest.mark.parametrize(("launched_s_ago", "is_over"), [(3590.0, False), (3610.0, True)])
def test_a_time_limit_counts_from_the_launch_not_from_the_last_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched_s_ago: float, is_over: bool
) -> None:
    monkeypatch.setattr(session, "launched_s_ago", lambda: launched_s_ago)
    monkeypatch.setattr(StopRequest, "install", lambda stop: stop)
    limits = {"startup_timeout_s": 60, "hang_timeout_s": 60, "max_hours": 1.0}
    with session.training_session(DistEnv(), tmp_path / "run", **limits) as run:
        assert bool(run.stop) == is_over
        assert run.stop.reason == ("max_hours" if is_over else "")
