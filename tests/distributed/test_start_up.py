"""What is read and hashed at the start of a run is so once, not on every rank or node: counted in real processes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dist_deeplab import train
from tests.distributed.forked_ranks import run_forked
from tests.distributed.workers import count_reads

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def arguments(shards: Path, output_dir: Path, *more: str) -> list[str]:
    """The arguments of a run of a few steps, with images that are repeated by their classes."""
    data = [f"data.train={shards}/train.json", f"output_dir={output_dir}", "name=run", "data.repeat_threshold=0.5"]
    small = ["model.backbone=resnet_tiny", "precision.dtype=fp32", "data.crop_size=33", "data.num_workers=0"]
    return [*data, *small, "batch.global_size=2", "tracking.uri=none", "checkpoint.every=1", *more]


@pytest.fixture(scope="module")
def two_steps(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of steps 1 and 2, the second one damaged."""
    out = tmp_path_factory.mktemp("runs")
    assert train.main(arguments(sample_shards, out, "max_steps=2")) == 0
    newest = out / "run/checkpoints/step_00000002.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    return out / "run"


def counts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def opened(folder: Path, file: Path) -> list[int]:
    """How often each rank opened a file."""
    return [count["opened"].get(os.path.realpath(file), 0) for count in counts(folder)]


def test_one_rank_of_a_node_reads_the_initial_weights_and_the_samples_classes(
    two_steps: Path, sample_shards: Path, tmp_path: Path
) -> None:
    init = two_steps / "checkpoints/step_00000001.pt"
    more = arguments(sample_shards, tmp_path, "max_steps=1", f"model.init={init}")
    assert run_forked(count_reads.main, [(tmp_path, more)] * 2, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    first, second = opened(tmp_path, init)
    assert first > 0
    assert second == 0
    first, second = opened(tmp_path, sample_shards / "train.classes.npy")
    assert first > 0
    assert second == 0
    hashed = [count["hashed"] for count in counts(tmp_path)]
    assert hashed[0] > init.stat().st_size, "nothing was counted"
    assert hashed[1] < 100_000, "the checksums of the samples alone"
    assert counts(tmp_path)[1]["commands"] == []


def test_of_two_nodes_with_disks_of_their_own_one_reads_the_newest_sound_checkpoint_once(
    two_steps: Path, sample_shards: Path, tmp_path: Path
) -> None:
    """The second one's folder is empty; the newest checkpoint is damaged: both continue from the one before."""
    folders = [two_steps.parent, tmp_path / "other_disk"]
    runs = [arguments(sample_shards, folder, "max_steps=3", "resume_anyway=true") for folder in folders]
    exit_code = run_forked(count_reads.main, [(tmp_path, run) for run in runs], tmp_path / "log", nodes=2)
    said = (tmp_path / "log").read_text()
    assert exit_code == 0, said
    assert "step_00000002.pt is damaged" in said
    for rank, folder in enumerate(folders):
        assert "from step 1 to 3" in (folder / f"run/logs/rank_{rank}.log").read_text()
    checkpoints = two_steps / "checkpoints"
    assert opened(tmp_path, checkpoints / "step_00000001.pt") == [1, 0]
    # To be verified at the start; it is replaced by the run's own later.
    assert opened(tmp_path, checkpoints / "step_00000002.pt") == [1, 0]
    assert counts(tmp_path)[1]["hashed"] < 100_000
