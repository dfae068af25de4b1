"""Fixtures that start real processes on real (drawn) data."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]

for _name in [name for name in os.environ if name.startswith("PET_")]:
    del os.environ[_name]  # what launch/test.sh would have torchrun do; a test says itself what it wants


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the tests' own for what the package keeps for its user, e.g. the known MLflow stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _fresh_logging() -> Iterator[None]:
    """Undo what a command run in this process did to the package's logger."""
    yield
    logger = logging.getLogger("dist_deeplab")
    logger.propagate = True
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def command_environ() -> dict[str, str]:
    """This process's environment for a command started by a test: one thread, no rank, default MLflow store."""
    environ = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MLFLOW_TRACKING_URI")
    }
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return environ


def torchrun_command(num_processes: int, *target: str) -> list[str]:
    """The command line of a torchrun with so many local processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return [*launcher, *target]


def make_sample_shards(root: Path) -> Path:
    """Draw 16 + 7 images and return the folder with their shards: train.json (16) and val.json (7)."""
    command = [sys.executable, "-m", "dist_deeplab"]
    make_sample = [*command, "sample-voc", "--out", root, "--num-train", "16", "--num-val", "7"]
    subprocess.run(make_sample, check=True, env=command_environ(), capture_output=True)
    for split in ("train", "val"):
        voc = root / "VOCdevkit" / "VOC2012"
        make = [*command, "shards", "--voc-root", voc, "--split", split, "--out", root / "shards"]
        subprocess.run([*make, "--samples-per-shard", "6"], check=True, env=command_environ(), capture_output=True)
    return root / "shards"


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (16 drawn images) and val.json (7)."""
    return make_sample_shards(tmp_path_factory.mktemp("sample_voc"))


@pytest.fixture(scope="session")
def run_ranks() -> Run:
    """A function that runs `python target...` on so many ranks and returns the finished process."""

    def run(num_processes: int, *target: str | Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        command = torchrun_command(num_processes, *map(str, target))
        return subprocess.run(command, env=command_environ(), capture_output=True, text=True, timeout=timeout_s)

    return run
