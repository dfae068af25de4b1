"""What a command prints, returns and writes for its launcher: errors, exit codes, the run's status."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_deeplab.distributed import launcher
from dist_deeplab.distributed.failure import OtherRankFailed
from dist_deeplab.distributed.launcher import STATUS_VARIABLE, exit_with_error, run_command, write_status
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.errors import TrainingError, UserError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "outcome"))
    return tmp_path / "outcome"


def test_the_last_status_counts_and_has_the_first_step_of_this_start(file: Path, tmp_path: Path) -> None:
    run = TrainingSession(DistEnv(), rank_times=RankTimes(DistEnv(), tmp_path))
    run.report("running", 20)
    assert file.read_text() == "running 20 20\n"
    run.report("stopped", 25)
    assert file.read_text() == "stopped 20 25\n"
    assert list(tmp_path.iterdir()) == [file]


def test_only_the_main_rank_writes_the_status(file: Path, tmp_path: Path) -> None:
    env = DistEnv(1, 1, 2, "torchrun")
    TrainingSession(env, rank_times=RankTimes(env, tmp_path)).report("done", 5)
    assert not file.exists()


def test_no_launcher_needs_to_read_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    write_status("done")
    monkeypatch.setenv(STATUS_VARIABLE, str(tmp_path / "gone" / "outcome"))
    write_status("done")


# --- errors and exit codes --------------------------------------------------------------------------------------------


def test_the_main_rank_reports_an_error_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(launcher.time, "sleep", waits.append)
    assert exit_with_error(DistEnv(), UserError("no such thing")) == 2
    assert exit_with_error(DistEnv(), TrainingError("loss is nan")) == 1
    assert capsys.readouterr().err == "error: no such thing\nerror: loss is nan\n"
    assert waits == []


def test_another_rank_first_leaves_the_main_rank_time_and_then_names_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.time, "sleep", lambda wait: print("waited", wait > 0))
    assert exit_with_error(DistEnv(3, 1, 4, "slurm"), UserError("no such thing")) == 2
    printed = capsys.readouterr()
    assert printed.out == "waited True\n"
    assert printed.err == "error (rank 3): no such thing\n"


def test_a_command_gets_its_rank_and_its_exit_code_is_passed_on() -> None:
    assert run_command(lambda env: 75 if env == DistEnv() else 1) == 75


def test_an_error_of_the_environment_or_the_command_becomes_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(env: DistEnv) -> int:
        raise TrainingError("loss is nan")

    assert run_command(fail) == 1
    monkeypatch.setenv("RANK", "0")
    assert run_command(lambda env: 0) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: loss is nan"
    assert "but not WORLD_SIZE" in second


def test_a_crash_is_logged_with_its_traceback_and_one_that_follows_from_another_rank_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launcher, "setup_logging", lambda **options: None)

    def fail(env: DistEnv) -> int:
        raise errors.pop()

    errors: list[Exception] = [OtherRankFailed("rank 1 on b failed: no data"), ValueError("odd")]
    assert [run_command(fail), run_command(fail)] == [1, 1]
    crash, echo = caplog.records
    assert crash.exc_info is not None
    assert crash.exc_info[0] is ValueError
    assert (echo.getMessage(), echo.exc_info) == ("rank 0 ends: rank 1 on b failed: no data", None)


# --- launches ---------------------------------------------------------------------------------------------------------


def test_the_launch_is_as_old_as_torchrun_or_as_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own = launcher.launched_s_ago()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert 0 < own <= launcher.launched_s_ago() + 0.1


@pytest.mark.parametrize(
    ("restarts", "count", "signals"), [("3", "0", 1), ("3", "3", 0), ("0", "0", 0), (None, None, 0)]
)
def test_torchrun_is_ended_only_if_it_would_start_again(
    monkeypatch: pytest.MonkeyPatch, restarts: str | None, count: str | None, signals: int
) -> None:
    for name, value in (("TORCHELASTIC_MAX_RESTARTS", restarts), ("TORCHELASTIC_RESTART_COUNT", count)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(launcher.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(launcher, "_is_torchrun", lambda pid: False)
    launcher.refuse_restart()
    assert sent == [], "the parent merely inherited torchrun's variables"
    monkeypatch.setattr(launcher, "_is_torchrun", lambda pid: True)
    launcher.refuse_restart()
    assert sent == [(launcher.os.getppid(), launcher.signal.SIGTERM)] * signals


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["-m", "torch.distributed.run", "x.py"], True), (["x.py", "y"], False)]
)
def test_torchrun_is_known_by_its_command_line(arguments: list[str], expected: bool) -> None:
    program = [sys.executable, "-c", "print(flush=True); input()", *arguments]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()  # while it starts, its command line is empty
        assert launcher._is_torchrun(process.pid) == expected
    assert not launcher._is_torchrun(process.pid), "it is gone"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


REFUSED_BESIDE_THE_MAIN_RANK = """
from dist_deeplab.distributed.launcher import exit_with_error
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.stop_request import StopRequest
from dist_deeplab.errors import UserError
StopRequest().install()
print("ready", flush=True)
exit_with_error(DistEnv(1, 1, 2, "torchrun"), UserError("another recipe"))
"""


def test_another_rank_of_a_run_leaves_without_a_word_when_the_launcher_ends_it() -> None:
    """A run saves on SIGTERM; one that was refused has nothing to save, and the main rank has said why."""
    command = [sys.executable, "-c", REFUSED_BESIDE_THE_MAIN_RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while catches(process.pid, signal.SIGTERM):  # before it is refused, a rank takes one for a request to stop
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGTERM
