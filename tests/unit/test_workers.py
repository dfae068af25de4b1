"""Worker processes do not outlive the one they work for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import os, time
from dist_deeplab.data.packing.ordered_map import ordered_map

def look(item):
    return os.getpid()

if __name__ == "__main__":
    print(*set(ordered_map(look, range(64), workers=2)), flush=True)
    pool = ordered_map(look, range(1000), workers=2)
    print(next(pool), flush=True)
    time.sleep(600)
"""


LOADER = """
import functools, os, time
from torch.utils.data import DataLoader
from dist_deeplab.data.loader import loader_options

def start_once_the_parent_is_gone(start, worker):
    parent = os.getppid()
    os.write(1, b"%d\\n" % os.getpid())
    while os.getppid() == parent:
        time.sleep(0.01)
    start(worker)

options = loader_options(num_workers=2, pin_memory=False)
options["worker_init_fn"] = functools.partial(start_once_the_parent_is_gone, options["worker_init_fn"])
next(iter(DataLoader(range(4), **options)))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_the_workers_of_a_killed_process_leave(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        worker = int(process.stdout.readline())
        assert Path(f"/proc/{worker}").is_dir()
        process.kill()
    wait_for_end(worker)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_the_workers_of_a_loader_leave_though_their_rank_was_killed_while_they_started() -> None:
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        workers = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    for worker in workers:
        wait_for_end(worker)


def wait_for_end(worker: int) -> None:
    deadline = time.monotonic() + 60
    while _is_running(worker):
        assert time.monotonic() < deadline, f"worker {worker} outlived its parent"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
