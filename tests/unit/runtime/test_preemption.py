"""A signal becomes a flag and nothing else; a second one ends the process."""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest

from dist_deeplab.runtime.preemption import StopRequest

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    """An installed request; the handlers from before come back."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield StopRequest().install()
    for number, handler in before.items():
        signal.signal(number, handler)


def exit_code_after(*numbers: int) -> int | None:
    """Return how a process ends that catches these signals, one after the other, and then leaves with 75."""

    def run() -> None:
        stop = StopRequest().install()
        for number in numbers:
            os.kill(os.getpid(), number)
        os._exit(75 if stop else 0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def test_without_a_signal_nobody_asked_to_stop(stop: StopRequest) -> None:
    assert not stop
    assert exit_code_after() == 0


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_the_flag_and_the_process_goes_on(number: signal.Signals, stop: StopRequest) -> None:
    os.kill(os.getpid(), number)
    assert stop
    assert stop.signal_number == number


@pytest.mark.parametrize("number", NUMBERS)
def test_one_signal_does_not_end_a_process(number: signal.Signals) -> None:
    assert exit_code_after(number) == 75


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_or_sigterm_ends_the_process_at_once(first: signal.Signals, second: signal.Signals) -> None:
    assert exit_code_after(first, second) == -second


@pytest.mark.parametrize("first", NUMBERS)
def test_slurms_usr1_never_ends_a_process_however_often_it_comes(first: signal.Signals) -> None:
    assert exit_code_after(first, signal.SIGUSR1, signal.SIGUSR1) == 75


def test_before_install_signals_are_left_alone() -> None:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    stop = StopRequest()
    assert {number: signal.getsignal(number) for number in NUMBERS} == before
    assert not stop
