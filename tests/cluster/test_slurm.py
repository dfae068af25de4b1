"""`sbatch slurm/train.sh` on a real Slurm of two nodes: who takes part, and what the training is told.

The training itself is replaced, in a copy of launchers and package: it sums the ranks over the network and prints its
arguments. It does so without torch, whose import would be most of the work; `test_training.py` has the real training.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]

pytestmark = pytest.mark.slurm

STAND_IN = """
import json, os, socket, sys, time

FAILING_RANK = "--fail-on-rank-1"

def sum_over_ranks(rank, size):
    # Of rank + 1, by way of rank 0 at the address and port where torch would meet.
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(("", where[1])) as server:
            others = [server.accept()[0] for _ in range(size - 1)]
        total = 1 + sum(int(other.recv(100)) for other in others)
        for other in others:
            other.sendall(b"%d" % total)
        return total
    while True:
        try:
            with socket.create_connection(where) as main_rank:
                main_rank.sendall(b"%d" % (rank + 1))
                return int(main_rank.recv(100))
        except ConnectionRefusedError:  # not there yet
            time.sleep(0.1)

def main():
    if "RANK" not in os.environ:
        os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"])
    rank = int(os.environ["RANK"])
    total = sum_over_ranks(rank, int(os.environ["WORLD_SIZE"]))
    names = ("SLURM_NODEID", "SLURMD_NODENAME", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "SRUN_CPUS_PER_TASK",
             "TORCHELASTIC_RUN_ID", "INSIDE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    seen = {"rank": rank, "sum": total, "arguments": sys.argv[1:], "cwd": os.getcwd()}
    seen.update({name: os.environ.get(name) for name in names})
    sys.stdout.write("SEEN " + json.dumps(seen) + "\\n")
    sys.stdout.flush()
    if FAILING_RANK in sys.argv and rank == 1:
        return 1
    # Nothing in this process notices the other's end: only Slurm can end it.
    if FAILING_RANK in sys.argv:
        time.sleep(3600)
    return 0

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository of the real launchers and package, with a stand-in for the training."""
    for folder in ("launch", "slurm"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    shutil.copytree(REPO / "dist_deeplab", tmp_path / "dist_deeplab", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dist_deeplab" / "train.py").write_text(STAND_IN)
    return tmp_path


@pytest.fixture
def environ() -> Mapping[str, str]:
    """The tests' own environment as the active one."""
    return {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}


def seen(output: str) -> list[dict[str, Any]]:
    """What each process printed, in the order of ranks. srun's --label puts "0: " before each line."""
    lines = (line.partition("SEEN ")[2] for line in output.splitlines() if "SEEN {" in line)
    return sorted((json.loads(line) for line in lines), key=lambda process: process["rank"])


def test_both_nodes_take_part_and_arguments_arrive_unchanged(slurm, repo, environ):
    arguments = ["data.scale_range=[0.5, 1.5]", "name=it's a $HOME `test` *", "--config", "", 'x="a\\b"']
    state, output = slurm.run_job("--nodes=2", "slurm/train.sh", *arguments, cwd=repo, NPROC_PER_NODE="2", **environ)

    assert state == "COMPLETED", output
    processes = seen(output)
    assert [process["rank"] for process in processes] == [0, 1, 2, 3], output
    assert [process["sum"] for process in processes] == [1 + 2 + 3 + 4] * 4
    assert {process["SLURMD_NODENAME"] for process in processes} == set(slurm.nodes)
    assert sorted(process["LOCAL_RANK"] for process in processes) == ["0", "0", "1", "1"]
    assert all(process["arguments"] == arguments for process in processes), processes
    assert all(process["cwd"] == str(repo) for process in processes)
    assert all(process["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1" for process in processes)


def test_a_node_without_gpus_runs_one_process_and_cpus_per_task_reach_the_step(slurm, repo, environ):
    state, output = slurm.run_job("--nodes=2", "--cpus-per-task=3", "slurm/train.sh", cwd=repo, **environ)

    assert state == "COMPLETED", output
    processes = seen(output)
    assert [process["WORLD_SIZE"] for process in processes] == ["2", "2"], output
    assert [process["SRUN_CPUS_PER_TASK"] for process in processes] == ["3", "3"]


def test_one_failing_process_ends_the_job_on_all_nodes(slurm, repo, environ):
    once = {"PET_MAX_RESTARTS": "0"}
    state, output = slurm.run_job("--nodes=2", "slurm/train.sh", "--fail-on-rank-1", cwd=repo, **environ, **once)

    assert state == "FAILED", output
    assert len(seen(output)) == 2, output
    assert "First task exited" not in output  # srun's --wait, a minute later


def test_a_folder_without_the_scripts_is_refused_in_one_sentence(slurm, tmp_path, environ):
    state, output = slurm.run_job(str(REPO / "slurm" / "train.sh"), cwd=tmp_path, **environ)

    assert state == "FAILED"
    assert output.strip() == (
        f"slurm/train.sh: {tmp_path} does not hold launch/multi_node.sh and slurm/common.sh: call sbatch in the folder "
        "that does, or set REPO to it."
    )


def test_one_task_per_process_and_a_container_command_reach_the_step(slurm, repo, environ):
    inside = {"CONTAINER_EXEC": "env INSIDE=yes", "SRUN_OPTIONS": "--unbuffered"}
    state, output = slurm.run_job(
        "--nodes=2", "--ntasks-per-node=2", "slurm/train.sh", "x", cwd=repo, **environ, **inside
    )

    assert state == "COMPLETED", output
    processes = seen(output)
    assert [process["rank"] for process in processes] == [0, 1, 2, 3], output
    assert {process["INSIDE"] for process in processes} == {"yes"}
    assert {process["TORCHELASTIC_RUN_ID"] for process in processes} == {None}, "torchrun takes part"
