"""An error on one rank is on the terminal at once and ends all ranks, though waiting for a rank never returns.

Training shows it under torchrun, which ends the other rank; evaluation and prediction on forked ranks.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO, command_environ, torchrun_command
from tests.distributed.forked_ranks import run_forked
from tests.distributed.workers import failing_rank
from tests.networks import checkpoint_of, discerning_network, write_checkpoint
from tests.processes import environ_of

pytestmark = pytest.mark.distributed

WORKER = REPO / "tests/distributed/workers/failing_rank.py"
MARK = "DIST_DEEPLAB_FAILING_RANK"
SMALL = [
    "model.backbone=resnet_tiny",
    "precision.dtype=fp32",
    "data.crop_size=33",
    "data.num_workers=1",
    "batch.global_size=4",
    "max_steps=20",
]
TIMEOUT_S = 150  # importing torch on a busy machine; without the remedy it is the 31 minutes of a collective


@pytest.fixture(scope="module")
def damaged(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(sample_shards, tmp_path_factory.mktemp("damaged") / "shards")
    for shard in folder.glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"JFIF", b"JFIX"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt", checkpoint_of(discerning_network(21)))


@pytest.mark.quick("P9")
@pytest.mark.parametrize("fault", ["damaged", "oom"])
def test_train(sample_shards: Path, damaged: Path, tmp_path: Path, fault: str) -> None:
    data = [f"data.train={sample_shards}/train.json", f"output_dir={tmp_path}", "tracking.uri=none", "name=run"]
    what = "oom" if fault == "oom" else f"{sample_shards}={damaged}"
    command = torchrun_command(2, str(WORKER), what, "train", *data, *SMALL)
    environ = command_environ() | {MARK: str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    left = [pid for pid in pids if environ_of(pid).get(MARK) == str(tmp_path)]
    assert not left, left
    assert done.returncode == 1, done
    said = "out of memory" if fault == "oom" else "is damaged: its bytes do not have the checksum of the index"
    assert said in done.stderr
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert "rank 0 ends: rank 1 on" in log
    assert said in log


def fail(tmp_path: Path, *arguments: object) -> tuple[int, str]:
    """The exit code of a command that fails on rank 1 of two, and what it printed."""
    exit_code = run_forked(failing_rank.main, [tuple(map(str, arguments))] * 2, tmp_path / "log")
    return exit_code, (tmp_path / "log").read_text()


@pytest.mark.parametrize("fault", ["damaged", "oom"])
def test_evaluate(sample_shards: Path, damaged: Path, checkpoint: Path, tmp_path: Path, fault: str) -> None:
    arguments = [checkpoint, "--data", sample_shards / "val.json", "--out", tmp_path / "out", "data.num_workers=0"]
    what = "oom" if fault == "oom" else f"{sample_shards}={damaged}"
    exit_code, printed = fail(tmp_path, what, "evaluate", *arguments)
    assert exit_code == (1 if fault == "oom" else 2), printed
    said = "out of memory" if fault == "oom" else "is damaged: its bytes do not have the checksum of the index"
    assert said in printed


def test_predict(sample_shards: Path, checkpoint: Path, tmp_path: Path) -> None:
    images = sample_shards.parent / "VOCdevkit/VOC2012/JPEGImages"
    exit_code, printed = fail(tmp_path, "oom", "predict", checkpoint, images, "--out", tmp_path / "out")
    assert exit_code == 1, printed
    assert "out of memory" in printed
