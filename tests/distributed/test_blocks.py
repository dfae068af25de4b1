"""A run of `data.shuffle=blocks`, killed on one rank and on two, continues to the weights of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dist_deeplab import train
from tests.conftest import Run, command_environ, torchrun_command
from tests.distributed.same_run import weights_sha256
from tests.processes import ranks_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(420)]

MAX_STEPS = 12  # rounding doubles every two steps: more would be compared with more tolerance
SMALL = [
    *("model.backbone=resnet_tiny", "precision.dtype=fp32", "data.crop_size=65", "data.num_workers=1"),
    *("data.shuffle=blocks", "data.window_shards=1", "data.canonical_groups=2"),  # three shards: several windows
    *("batch.global_size=4", "optim.lr=1e-3", "tracking.uri=none", "tracking.log_every=1", "checkpoint.every=2"),
    *(f"max_steps={MAX_STEPS}", "checkpoint.keep_last=99"),
]


def arguments(shards: Path, output_dir: Path) -> list[str]:
    return [f"data.train={shards}/train.json", f"output_dir={output_dir}", "name=run", *SMALL]


def kill_after(step: int, command: list[str], run_dir: Path) -> None:
    """Start a run and kill all its processes at once, once the journal holds a step."""
    with subprocess.Popen(command, env=command_environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        journal, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not journal.exists() or not any(
            json.loads(line).get("step", 0) >= step for line in journal.read_text().splitlines()[:-1]
        ):
            assert time.monotonic() < deadline, f"{run_dir} did not reach step {step}"
            time.sleep(0.01)
        for pid in [*(pid for _, pid in ranks_of(process.pid)), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (run_dir / f"checkpoints/step_{MAX_STEPS:08d}.pt").exists(), "killed too late to test anything"


def weights_at(step: int, run_dir: Path) -> torch.Tensor:
    """All weights and statistics as one vector."""
    model = torch.load(run_dir / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)["model"]
    return torch.cat([tensor.double().flatten() for tensor in model.values()])


def test_a_run_of_blocks_killed_on_one_and_two_ranks_ends_as_an_undisturbed_one(
    run_ranks: Run, sample_shards: Path, tmp_path: Path
) -> None:
    """On one rank to the last bit; on two and three ranks with the same samples, so that only rounding differs."""
    assert train.main(arguments(sample_shards, tmp_path / "undisturbed")) == 0
    undisturbed = tmp_path / "undisturbed/run"

    one = arguments(sample_shards, tmp_path / "one")
    kill_after(2, [sys.executable, "-m", "dist_deeplab.train", *one], tmp_path / "one/run")
    shutil.copytree(tmp_path / "one", tmp_path / "more")
    assert train.main(one) == 0
    assert weights_sha256(tmp_path / "one/run") == weights_sha256(undisturbed)

    more = ["-m", "dist_deeplab.train", *arguments(sample_shards, tmp_path / "more")]
    kill_after(6, torchrun_command(2, *more), tmp_path / "more/run")
    resumed = run_ranks(3, *more)
    assert resumed.returncode == 0, resumed.stderr
    expected = weights_at(MAX_STEPS, undisturbed)
    learnt = (weights_at(MAX_STEPS - 4, undisturbed) - expected).norm()
    assert (weights_at(MAX_STEPS, tmp_path / "more/run") - expected).norm() <= 1e-4 * learnt
    log = (tmp_path / "more/run/logs/rank_0.log").read_text()
    assert all(f"4 images a step = {ranks} rank" in log for ranks in (1, 2, 3))
