"""Network namespaces stand for hosts: a cable that is pulled during a step, and put back."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dist_deeplab.checkpointing.file import load_content
from dist_deeplab.checkpointing.folder import CheckpointFolder
from tests.conftest import command_environ

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(420)]

TIMEOUT_S = 150


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.213.x.1 and 10.213.x.2, with a cable between their interfaces `cable`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = (f"dd{os.getpid()}a", f"dd{os.getpid()}b")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.213.77.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_a_cut_cable_ends_in_a_clear_error_and_the_run_resumes_once_it_is_back(
    hosts: tuple[str, str], sample_shards: Path, tmp_path: Path
) -> None:
    data = [f"data.train={sample_shards}/train.json", f"output_dir={tmp_path}", "name=run", "data.crop_size=65"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.num_workers=0",
        "batch.global_size=4",
        "tracking.uri=none",
    ]
    often = ["max_steps=4000", "tracking.log_every=1", "checkpoint.every=2"]
    limits = ["distributed.hang_timeout_s=8", "distributed.startup_timeout_s=60"]
    run_dir, number = tmp_path / "run", itertools.count()
    logs: list[Path] = []

    def start(stack: ExitStack, rank: int) -> "subprocess.Popen[bytes]":
        logs.append(tmp_path / f"{next(number)}.log")
        ranks = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "10.213.77.1", "MASTER_PORT": "29500"}
        command = ["ip", "netns", "exec", hosts[rank], sys.executable, "-m", "dist_deeplab.train"]
        output = stack.enter_context(logs[-1].open("wb"))
        process = subprocess.Popen(
            [*command, *data, *small, *often, *limits], env=command_environ() | ranks | address, stdout=output,
            stderr=output,
        )  # fmt: skip
        stack.callback(lambda: (process.kill(), process.wait(30)))
        return process

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not what():
            assert time.monotonic() < deadline, "\n".join(log.read_text()[-3000:] for log in logs)
            time.sleep(0.2)

    def steps() -> list[int]:
        log = run_dir / "logs/rank_0.log"
        return [int(step) for step in re.findall(r"step +(\d+)/", log.read_text())] if log.exists() else []

    with ExitStack() as stack:
        ranks = [start(stack, rank) for rank in (0, 1)]
        wait_for(lambda: len(steps()) >= 3)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        wait_for(lambda: all(rank.poll() is not None for rank in ranks))
        assert [rank.returncode for rank in ranks] == [1, 1]
        said = logs[0].read_text() + logs[1].read_text()
        assert "no progress for 8 s (distributed.hang_timeout_s)" in said
        assert "no heartbeat from rank 1" in said
        assert "rank 0's store does not answer: its process has ended or the network to it is cut" in said
        for rank in (0, 1):
            assert "dist_deeplab/train.py" in (run_dir / f"logs/rank_{rank}.stacks").read_text()

        folder = CheckpointFolder(run_dir / "checkpoints", keep_last=2, is_writer=True)
        newest = folder.read_newest(lambda path: path if load_content(path) else None)
        assert newest is not None
        before = steps()
        ip("-n", hosts[1], "link", "set", "cable", "up")
        again = [start(stack, rank) for rank in (0, 1)]
        wait_for(lambda: len(steps()) > len(before) + 2)
        again[0].send_signal(signal.SIGTERM)
        wait_for(lambda: all(rank.poll() is not None for rank in again))
        assert [rank.returncode for rank in again] == [75, 75]
    saved = int(newest.stem.removeprefix("step_"))
    assert re.findall(r"from step (\d+)", logs[2].read_text()) == [str(saved)]
    assert saved <= max(before)
    assert steps()[len(before)] == saved + 1
