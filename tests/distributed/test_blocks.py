"""A run of `data.shuffle=blocks`, killed on one rank and on two, continues to the weights of an undisturbed one."""

import shutil
from pathlib import Path

import pytest
import torch

from dist_deeplab import train
from tests.distributed.disturbed_run import KILLED, Fault, start
from tests.distributed.same_run import weights_sha256

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


def weights_at(step: int, run_dir: Path) -> torch.Tensor:
    """All weights and statistics as one vector."""
    model = torch.load(run_dir / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)["model"]
    return torch.cat([tensor.double().flatten() for tensor in model.values()])


def test_a_run_of_blocks_killed_on_one_and_two_ranks_ends_as_an_undisturbed_one(
    sample_shards: Path, tmp_path: Path
) -> None:
    """On one rank to the last bit; on two and three ranks with the same samples, so that only rounding differs."""
    assert train.main(arguments(sample_shards, tmp_path / "undisturbed")) == 0
    undisturbed = tmp_path / "undisturbed/run"

    one, log = arguments(sample_shards, tmp_path / "one"), tmp_path / "log"
    assert start(one, tmp_path / "one/run", log, fault=Fault("kill", "step", 2)) == KILLED
    shutil.copytree(tmp_path / "one", tmp_path / "more")
    assert train.main(one) == 0
    assert weights_sha256(tmp_path / "one/run") == weights_sha256(undisturbed)

    more, folder = arguments(sample_shards, tmp_path / "more"), tmp_path / "more/run"
    assert start(more, folder, log, fault=Fault("kill", "step", 4, rank=1), ranks=2) == KILLED
    assert start(more, folder, log, ranks=3) == 0, log.read_text()
    expected = weights_at(MAX_STEPS, undisturbed)
    learnt = (weights_at(MAX_STEPS - 4, undisturbed) - expected).norm()
    assert (weights_at(MAX_STEPS, folder) - expected).norm() <= 1e-4 * learnt
    text = (folder / "logs/rank_0.log").read_text()
    assert all(f"4 images a step = {ranks} rank" in text for ranks in (1, 2, 3))
