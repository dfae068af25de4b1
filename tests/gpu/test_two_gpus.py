"""Two ranks as users start them, on two GPUs, all by NCCL.

On the CPU, where tests/distributed has two, they run as well, so that they work when they meet a GPU: collectives on
two ranks, commands on one, in this process.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import REPO, Run

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices and torch sees fewer")

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("devices")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_collectives_of_both_devices_agree_and_a_snapshot_of_a_ddp_step_is_the_same_on_all(run_ranks: Run) -> None:
    done = run_ranks(2, REPO / "tests/distributed/workers/both_devices.py")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def command(request: pytest.FixtureRequest, run_ranks: Run) -> Callable[..., None]:
    """Function that runs a module of the package, on two ranks where the devices are GPUs, and checks its exit code."""

    def run(name: str, *arguments: str) -> None:
        if request.node.callspec.params["devices"] == "cpu":
            assert importlib.import_module(f"dist_deeplab.{name}").main([*arguments, "device=cpu"]) == 0
        else:
            done = run_ranks(2, "-m", f"dist_deeplab.{name}", *arguments)
            assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_every_kernel_passes_the_doctor(command: Callable[..., None], sample_shards: Path, tmp_path: Path) -> None:
    small = ["model.backbone=resnet_tiny", "data.crop_size=65", "data.num_workers=1"]
    command("doctor", f"data.train={sample_shards}/train.json", f"output_dir={tmp_path}/runs", *small)


def test_a_run_saves_and_resumes(command: Callable[..., None], sample_shards: Path, tmp_path: Path) -> None:
    data = [f"data.train={sample_shards}/train.json", f"data.val={sample_shards}/val.json", f"output_dir={tmp_path}"]
    small = ["model.backbone=resnet_tiny", "data.crop_size=33", "data.num_workers=1", "batch.global_size=4"]
    few = ["eval.num_panels=0", "tracking.uri=none", "tracking.log_every=1", "checkpoint.every=2", "name=run"]
    for max_steps in (2, 4):
        command("train", *data, *small, *few, f"max_steps={max_steps}", "resume_anyway=true")
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert sorted(line["step"] for line in lines if line.get("key") == "train/loss") == [1, 2, 3, 4]
