"""A job on a real Slurm that is warned, loses a process for good, is requeued by hand, and still ends as it should."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import wait_until
from tests.conftest import REPO
from tests.processes import environ_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

MAX_STEPS = 60
STEP_TIMEOUT_S = 180


@pytest.fixture
def environ() -> Mapping[str, str]:
    return {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "REPO": str(REPO)}


@pytest.fixture
def arguments(sample_shards: Path, tmp_path: Path) -> list[str]:
    data = [f"data.train={sample_shards}/train.json", "data.crop_size=65", "data.num_workers=0", "tracking.uri=none"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "batch.global_size=4",
        "optim.lr=1e-3",
        f"max_steps={MAX_STEPS}",
    ]
    return [*data, *small, f"output_dir={tmp_path}", "name=run", "tracking.log_every=1", "checkpoint.every=5"]


def last_step(run_dir: Path) -> int:
    journal = run_dir / "metrics.jsonl"
    lines = journal.read_text().splitlines()[:-1] if journal.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def processes_of_step(job: str) -> list[int]:
    """The processes of a job's training step: the ranks, on both nodes."""
    environs = {int(folder.name): environ_of(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    return [pid for pid, environ in environs.items() if environ.get("SLURM_JOB_ID") == job and "RANK" in environ]


def listens(rank: int, port: int) -> bool:
    """Whether a rank's torchrun holds the rendezvous of all: on one host that is the one that came first."""
    connections = psutil.Process(parent_of(rank)).net_connections("tcp")
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)


def daemons_of(job: str) -> list[int]:
    """The daemons that hold a job's steps on its nodes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                found.append(int(folder.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lose_node(rank: int) -> None:
    """Kill, as a power cut does, the daemon that holds a rank's step on its node and all that it started."""
    while "slurmstepd" not in Path(f"/proc/{rank}/comm").read_text():
        rank = parent_of(rank)
    lost = [rank]
    for pid in lost:
        os.kill(pid, signal.SIGSTOP)  # nobody notices before all are listed
        lost += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for pid in lost:
        os.kill(pid, signal.SIGKILL)


def test_a_job_survives_a_warning_a_lost_node_and_a_requeue(slurm, environ, arguments, tmp_path):
    patience = {"SRUN_OPTIONS": "--wait=5", "PET_RDZV_CONF": "join_timeout=40"}  # of srun with a lost node; of torchrun
    job = slurm.run(
        "sbatch",
        "--parsable",
        "--nodes=2",
        str(REPO / "slurm/train.sh"),
        *arguments,
        cwd=tmp_path,
        **environ,
        **patience,
    ).strip()
    run_dir = tmp_path / "run"
    output = Path(slurm.job_field(job, "StdOut"))

    def wait_for_steps(number: int, restarts: int) -> None:
        """Until the attempt after so many restarts has made so many steps."""
        hurried = False

        def made() -> bool:
            nonlocal hurried
            if slurm.job_field(job, "JobState") == "PENDING" and restarts and not hurried:
                # What is left of the attempt before must be gone: Slurm itself waits two minutes.
                wait_until(lambda: not processes_of_step(job) and not daemons_of(job), STEP_TIMEOUT_S)
                wait_until(lambda: slurm.run("sinfo", "-hN", "-o", "%T").split() == ["idle"] * 2, STEP_TIMEOUT_S)
                if restarts == 2:  # slurmd still has its records of the step whose daemon was killed, and fails the job
                    time.sleep(8)
                with contextlib.suppress(RuntimeError):  # it has started by now
                    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                    hurried = True
            text = output.read_text() if output.exists() else ""
            assert not slurm.is_over(job), slurm.run("scontrol", "show", "job", job) + text
            attempts = re.split(r"from step \d+ to", text)[1:]
            return len(attempts) > restarts and len(re.findall(r"\d step +\d+/", attempts[restarts])) >= number

        wait_until(made, STEP_TIMEOUT_S)

    wait_for_steps(3, restarts=0)
    slurm.run("scancel", "--signal=USR1", job)
    wait_for_steps(9, restarts=1)
    assert "stopped (SIGUSR1), saved step" in output.read_text()
    assert "stopped and saved; back into the queue (restart 1)" in output.read_text()

    # The node with the rendezvous: torchrun on the other one ends at once, and would wait `join_timeout` if it had it.
    port = int(re.findall(r"rendezvous at \S+:(\d+),", output.read_text())[-1])
    lose_node(next(rank for rank in processes_of_step(job) if listens(rank, port)))
    wait_for_steps(3, restarts=2)
    assert "back into the queue (restart 2)" in output.read_text()

    slurm.run("scontrol", "requeue", job)
    wait_for_steps(3, restarts=3)

    wait_until(lambda: slurm.is_over(job), STEP_TIMEOUT_S)
    assert slurm.job_field(job, "JobState") == "COMPLETED", output.read_text()
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in points if r.get("key") == "train/loss"] == list(range(1, MAX_STEPS + 1))
    starts = [int(step) for step in re.findall(r"from step (\d+) to", output.read_text())]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert not list(REPO.glob(f".dist_deeplab-{job}.*"))


def test_a_cancelled_job_saves_and_does_not_come_back(slurm, environ, arguments, tmp_path):
    job = slurm.run(
        "sbatch", "--parsable", "--nodes=1", str(REPO / "slurm/train.sh"), *arguments, cwd=tmp_path, **environ
    ).strip()
    wait_until(lambda: last_step(tmp_path / "run") >= 2, STEP_TIMEOUT_S)
    slurm.run("scancel", job)
    wait_until(lambda: slurm.is_over(job), STEP_TIMEOUT_S)
    assert slurm.job_field(job, "JobState") == "CANCELLED"
    assert slurm.job_field(job, "Restarts") == "0"


def test_a_mistake_in_the_arguments_is_said_once_and_not_tried_again(slurm, environ, arguments, tmp_path):
    state, output = slurm.run_job(
        "--nodes=1", str(REPO / "slurm/train.sh"), *arguments, "optim.lr=-1", cwd=tmp_path, **environ
    )
    assert state == "FAILED", output
    assert output.count("0: error: ") == 1, output
    assert "requeue" not in output
