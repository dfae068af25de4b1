"""`dist-deeplab torchrun` ends with the run's own sentence and exit code; its settings are what the project needs."""

import logging
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dist_deeplab.commands import torchrun
from dist_deeplab.distributed.launcher import STATUS_VARIABLE
from tests.conftest import REPO

WORKER = """
import os, signal, sys, time

mode, rank = sys.argv[1], int(os.environ["RANK"])
if rank == 0:
    from dist_deeplab.distributed.launcher import write_status
stop = []
if mode == "mistake":  # before a run has its signal handlers, or after it has put them back
    if rank == 0:
        print("error: no such file", file=sys.stderr, flush=True)
        write_status("refused")
        os._exit(2)
    time.sleep(60)  # as exit_with_error does: the main rank's sentence comes first, then torchrun ends this process
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stop.append(number))
if mode == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 0:
    write_status("running")
    if mode == "stop":
        os.kill(os.getppid(), signal.SIGUSR1)
while not stop:
    time.sleep(0.05)
if rank == 0 and mode == "stop":
    print("stopped, saved step 12", file=sys.stderr, flush=True)
    write_status("stopped")
os._exit(75)
"""


def launch(tmp_path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "dist_deeplab", "torchrun", "--standalone", "--nproc_per_node=2", script, mode]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "DIST_DEEPLAB"))}
    environ |= {"PYTHONPATH": str(REPO)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mode", "code", "lines"),
    [
        ("mistake", 2, ["error: no such file"]),
        ("stop", 75, ["torchrun: SIGUSR1: passed on, the processes save and stop", "stopped, saved step 12"]),
        ("killed", 1, ["torchrun: the process of local rank 1 failed: killed by SIGKILL"]),
    ],
)
def test_the_ending_is_the_runs_own_sentence_and_exit_code(
    tmp_path: Path, mode: str, code: int, lines: list[str]
) -> None:
    done = launch(tmp_path, mode)
    assert (done.returncode, done.stderr.splitlines()) == (code, lines)


def test_a_user_setting_goes_before_the_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*torchrun.SETTINGS, "OMP_NUM_THREADS", STATUS_VARIABLE):
        monkeypatch.setenv(name, "")  # remembers what to restore: main() sets them in this process
        monkeypatch.delenv(name)
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "7")
    monkeypatch.setattr(torchrun, "launch", lambda arguments: None)
    monkeypatch.setattr(torchrun, "quieten_agent", lambda status_file: None)
    assert torchrun.main(["--standalone", "--nproc_per_node", "1000", "script.py"]) == 0
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "SIGUSR1" in os.environ["PET_SIGNALS_TO_HANDLE"]
    assert os.environ["PET_SHUTDOWN_TIMEOUT"] == "7"
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("gpus", "nodes", "numactl", "chosen", "binds"),
    [
        (8, 2, True, None, True),
        (8, 1, True, None, False),
        (8, 2, False, None, False),
        (4, 2, True, None, False),
        (0, 2, True, None, False),
        (8, 2, True, "socket", False),
    ],
)
def test_processes_are_bound_where_each_has_a_gpu_and_the_machine_several_numa_nodes(
    gpus: int,
    nodes: int,
    numactl: bool,
    chosen: str | None,
    binds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(nodes):
        (tmp_path / f"node{number}").mkdir()
    monkeypatch.setattr(torchrun, "NUMA_NODES", tmp_path)
    monkeypatch.setattr(torchrun.shutil, "which", lambda name: "/usr/bin/numactl" if numactl else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    arguments = Namespace(numa_binding=chosen, nproc_per_node="8")
    assert torchrun.can_bind_to_numa_nodes(arguments) is binds
    del arguments.numa_binding
    assert not torchrun.can_bind_to_numa_nodes(arguments), "a torchrun without the option"


def test_an_unknown_message_of_torchrun_keeps_its_first_line() -> None:
    record = logging.LogRecord("torch", logging.ERROR, "", 0, "rendezvous failed\nTraceback ...", None, None)
    assert torchrun.OneLine().format(record) == "torchrun: rendezvous failed"
