"""What torchrun does without our settings; a failing test says what to remove. See tests/unit/test_workarounds.py."""

import os
import signal
import subprocess
from pathlib import Path

from tests.conftest import command_environ, torchrun_command

KILLED_ONCE = """
import datetime, os, signal
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
group = dist.new_group(backend="gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 4))
for step in range(5):
    model(torch.ones(2, 4)).sum().backward()
    dist.all_reduce(torch.ones(1), group=group)
    if step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
os._exit(0)
"""
TRIES = 3  # it does not come each time: twice of three, or more often
TIME_LIMIT_S = 45  # a restart that reads stale keys fails or hangs


def restarts(script: Path) -> bool:
    environ = command_environ() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    command = torchrun_command(2, "--max-restarts=1", str(script))
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environ, stdout=quiet, stderr=quiet, start_new_session=True) as agent:
        try:
            return agent.wait(TIME_LIMIT_S) == 0
        except subprocess.TimeoutExpired:
            os.killpg(agent.pid, signal.SIGTERM)
            agent.wait(60)
            return False


def test_a_restart_by_torchrun_alone_still_reads_stale_keys(tmp_path: Path) -> None:
    """torch 2.13: the agent keeps its store, and ranks connect to processes that are gone (pytorch#135712)."""
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    works = all(restarts(script) for _ in range(TRIES))
    assert not works, "remove TORCH_DISABLE_SHARE_RDZV_TCP_STORE (commands/torchrun.py, launch/common.sh)"
