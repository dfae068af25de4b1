"""Two torchrun agents stand for two machines of unlike size: one is lost, the other continues alone; it comes back."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import command_environ

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(420)]

MAX_STEPS = 400  # more than pass before the second loss: the test ends the run itself
TIMEOUT_S = 120

StartAgent = Callable[[int], "subprocess.Popen[bytes]"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nothing listens at port {port}"
        time.sleep(0.2)


@pytest.fixture
def start_agent(sample_shards: Path, tmp_path: Path) -> Iterator[StartAgent]:
    """A function that starts the torchrun of a machine with a number of ranks; all rendezvous at one port."""
    port = free_port()
    endpoint = f"localhost:{port}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=x", "--local_addr=localhost"]
    quick = ["--rdzv_conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=6", "--max_restarts=5"]
    data = [f"data.train={sample_shards}/train.json", f"output_dir={tmp_path}", "name=run", "data.crop_size=65"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.num_workers=0",
        "batch.global_size=4",
        "batch.micro_size=2",
    ]
    often = [f"max_steps={MAX_STEPS}", "tracking.log_every=1", "checkpoint.every=2", "tracking.uri=none"]
    command = ["-m", "dist_deeplab.train", *data, *small, *often]
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "output.log").open("ab"))

        def start(ranks: int) -> "subprocess.Popen[bytes]":
            environ = command_environ() | {"PET_MONITOR_INTERVAL": "1"}
            whole = [*launcher, f"--nproc_per_node={ranks}", *meeting, *quick, *command]
            agent = subprocess.Popen(whole, env=environ, stdout=log, stderr=log, start_new_session=True)
            stack.callback(lambda: (kill(agent), agent.wait(30)))
            wait_for_port(port)  # the first to bind it keeps the rendezvous: let that be the one started first
            return agent

        yield start


def kill(agent: "subprocess.Popen[bytes]") -> None:
    """Kill an agent and all its processes at once, as a power cut does."""
    if agent.poll() is None:
        os.killpg(agent.pid, signal.SIGKILL)


def test_a_lost_machine_is_done_without_and_taken_up_again(start_agent: StartAgent, tmp_path: Path) -> None:
    log = tmp_path / "run/logs/rank_0.log"

    def splits() -> list[str]:
        return re.findall(r"images a step = (\d ranks? x .*)", log.read_text()) if log.exists() else []

    def steps() -> list[int]:
        return [int(step) for step in re.findall(r"step +(\d+)/", log.read_text())] if log.exists() else []

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not what():
            assert time.monotonic() < deadline, (tmp_path / "output.log").read_text()[-6000:]
            time.sleep(0.2)

    first, second = start_agent(1), start_agent(2)
    wait_for(lambda: len(splits()) >= 1 and len(steps()) >= 3)
    together = len(splits())
    assert splits()[-1].startswith("3 ranks x up to 2 images x 1 "), splits()

    kill(second)
    wait_for(lambda: len(splits()) > together and splits()[-1].startswith("1 rank"))
    alone = len(steps())
    wait_for(lambda: len(steps()) > alone + 2)
    assert "x 2 images x 2 accumulated" in splits()[-1], "the accumulation grows: a step has the same images"

    third = start_agent(2)
    wait_for(lambda: splits()[-1].startswith("3 ranks"))
    back = len(steps())
    wait_for(lambda: len(steps()) > back + 2)
    for agent in (first, third):
        agent.send_signal(signal.SIGTERM)
    for agent in (first, third):
        agent.wait(60)
    points = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [record["step"] for record in points if record.get("key") == "train/loss"]
    assert sorted(logged) == list(range(1, len(logged) + 1)), "one unbroken curve"
