"""slurm/train.sh's own decisions, with stand-ins for srun and scontrol: exit codes, signals, requeueing."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.test_scripts import PATH, REPO, write_program

JOB = "4711"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    for folder in ("launch", "slurm"):
        shutil.copytree(REPO / folder, tmp_path / "repo" / folder)
    return tmp_path / "repo"


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """A stand-in that knows one node and writes down what is requeued."""
    return write_program(
        tmp_path / "bin" / "scontrol",
        f"""
case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") echo "JobState=RUNNING" ;;
    requeue*) echo "$2" >>{tmp_path}/requeued ;;
esac
""",
    )


def start(repo: Path, tmp_path: Path, srun: str, *, script: str = "train", **environ: str) -> subprocess.Popen[str]:
    """Start a batch script with this stand-in for srun."""
    write_program(tmp_path / "bin" / "srun", srun)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "DIST_DEEPLAB", "PET_"))}
    clean |= {"PATH": f"{tmp_path / 'bin'}:{PATH}", "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "localhost"}
    clean |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(repo), **environ}
    command = [repo / f"slurm/{script}.sh", "name=x"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=repo,
        env=clean,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


def run(repo: Path, tmp_path: Path, srun: str, **environ: str) -> tuple[int, str, str]:
    process = start(repo, tmp_path, srun, **environ)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def requeued(tmp_path: Path) -> list[str]:
    file = tmp_path / "requeued"
    return file.read_text().split() if file.exists() else []


STOPPED = 'echo "stopped 0 40" >"$DIST_DEEPLAB_OUTCOME"; exit 75'


@pytest.mark.parametrize("code", [0, 1, 3])
@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_the_jobs_exit_code_is_that_of_its_step(
    repo: Path, scontrol: Path, tmp_path: Path, script: str, code: int
) -> None:
    assert run(repo, tmp_path, f"exit {code}", script=script)[0] == code


@pytest.mark.parametrize("count", [0, 3])
def test_each_attempt_has_a_rendezvous_of_its_own(repo: Path, scontrol: Path, tmp_path: Path, count: int) -> None:
    srun = f'echo "$RDZV_ID $RDZV_ENDPOINT" >{tmp_path}/seen'
    assert run(repo, tmp_path, srun, SLURM_RESTART_COUNT=str(count))[0] == 0
    assert (tmp_path / "seen").read_text() == f"{JOB}.{count} localhost:24711\n"


@pytest.mark.parametrize(("script", "default"), [("train", "3"), ("evaluate", "0")])
def test_a_crash_restarts_a_training_three_times_and_an_evaluation_never_unless_the_user_says_otherwise(
    repo: Path, scontrol: Path, tmp_path: Path, script: str, default: str
) -> None:
    srun = f'echo "$PET_MAX_RESTARTS" >>{tmp_path}/seen'
    assert run(repo, tmp_path, srun, script=script)[0] == 0
    assert run(repo, tmp_path, srun, script=script, PET_MAX_RESTARTS="7")[0] == 0
    assert (tmp_path / "seen").read_text().split() == [default, "7"]


def test_a_node_whose_name_nobody_resolves_is_reached_at_the_address_that_slurm_has(
    repo: Path, scontrol: Path, tmp_path: Path
) -> None:
    write_program(
        scontrol,
        """
case "$1 $2" in
    "show hostnames") echo n1.invalid ;;
    "show node") printf '%s\\n' "NodeName=n1 Arch=x86_64" "   NodeAddr=10.1.2.3 NodeHostName=n1 Version=22.05" ;;
esac
""",
    )
    assert run(repo, tmp_path, f'echo "$RDZV_ENDPOINT" >{tmp_path}/seen')[0] == 0
    assert (tmp_path / "seen").read_text() == "10.1.2.3:24711\n"


def test_the_failure_of_one_node_ends_the_step_on_all(repo: Path, scontrol: Path, tmp_path: Path) -> None:
    """At once after a bad exit, after a minute where a node is gone: nobody is there to restart a part of a run."""
    assert run(repo, tmp_path, f'printf "%s\\n" "$@" >{tmp_path}/options', SLURM_JOB_NUM_NODES="2")[0] == 0
    assert {"--kill-on-bad-exit=1", "--wait=60"} <= set((tmp_path / "options").read_text().splitlines())


@pytest.mark.parametrize(("restarts", "again"), [(0, True), (1, True), (2, False)])
def test_a_stopped_run_is_requeued_max_requeues_times(
    repo: Path, scontrol: Path, tmp_path: Path, restarts: int, again: bool
) -> None:
    code, out, _ = run(repo, tmp_path, STOPPED, SLURM_RESTART_COUNT=str(restarts), MAX_REQUEUES="2")
    assert requeued(tmp_path) == [JOB] * again
    assert code == (0 if again else 75)
    assert again or "not requeued: MAX_REQUEUES=2 is reached" in out


def test_a_restart_beyond_the_limit_ends_in_one_sentence(repo: Path, scontrol: Path, tmp_path: Path) -> None:
    code, _, err = run(repo, tmp_path, "echo started", SLURM_RESTART_COUNT="3", MAX_REQUEUES="2")
    assert code == 1
    assert err == ("slurm/train.sh: this is restart 3, MAX_REQUEUES is 2: submit the same command again to resume.\n")


def test_a_cancelled_job_does_not_come_back(repo: Path, scontrol: Path, tmp_path: Path) -> None:
    scontrol.write_text(scontrol.read_text().replace("JobState=RUNNING", "JobState=CANCELLED"))
    code, out, _ = run(repo, tmp_path, STOPPED)
    assert (code, requeued(tmp_path)) == (75, [])
    assert "not requeued: it was cancelled" in out


def test_a_job_that_ends_for_good_leaves_no_file_behind(repo: Path, scontrol: Path, tmp_path: Path) -> None:
    assert run(repo, tmp_path, STOPPED)[0] == 0
    assert list(repo.glob(".dist_deeplab-*")), "for the next attempt"
    assert run(repo, tmp_path, 'echo "done 40 60" >"$DIST_DEEPLAB_OUTCOME"', SLURM_RESTART_COUNT="1")[0] == 0
    assert not list(repo.glob(".dist_deeplab-*"))


def test_a_refused_run_is_not_requeued(repo: Path, scontrol: Path, tmp_path: Path) -> None:
    code, *_ = run(repo, tmp_path, 'echo "refused 0 0" >"$DIST_DEEPLAB_OUTCOME"; exit 2')
    assert (code, requeued(tmp_path)) == (2, [])


def test_a_node_that_the_controller_does_not_know_is_an_error(repo: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "scontrol", "exit 1")
    code, _, err = run(repo, tmp_path, "echo started")
    assert (code, err) == (1, "slurm/train.sh: scontrol does not know localhost.\n")


@pytest.fixture
def waiting(repo: Path, scontrol: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A job whose step waits for SIGUSR1 or SIGTERM and says which came."""
    srun = f"""
stop() {{ echo "$1" >{tmp_path}/signal; echo stopped 0 40 >"$DIST_DEEPLAB_OUTCOME"; exit 75; }}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
touch {tmp_path}/up
while :; do sleep 0.05; done
"""
    process = start(repo, tmp_path, srun)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    with contextlib.suppress(ProcessLookupError):  # a script that fails to pass the signal on leaves its step behind
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_shell_reaches_the_step(
    waiting: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    waiting.send_signal(number)
    out, err = waiting.communicate(timeout=60)
    name = number.name.removeprefix("SIG")
    assert (tmp_path / "signal").read_text() == f"{name}\n"
    assert f"slurm/train.sh: {number.name}: asking the step to stop" in err
    assert "stopped and saved; back into the queue (restart 1)" in out
