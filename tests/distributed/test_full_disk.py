"""A run of two ranks on a disk that fills up, a real tmpfs: it trains to its end; no restart is lost to a full disk."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_deeplab import train
from tests.distributed.forked_ranks import run_forked

SIZE_MIB = 24

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `SIZE_MIB`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave not a byte."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError:
                continue


def arguments(shards: Path, disk: Path, max_steps: int) -> list[str]:
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", "data.crop_size=65", "data.num_workers=0"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "batch.global_size=4",
        "tracking.log_every=1",
        "eval.every=0",
    ]
    where = [f"output_dir={disk}", "name=full", "tracking.on_event=true", "tracking.system_metrics=true"]
    return [*data, *small, *where, f"max_steps={max_steps}", "resume_anyway=true"]


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["value"] for r in records if r.get("key") == "train/loss"}


def test_a_restart_on_a_full_disk_trains_on_and_says_once_what_is_not_written(
    small_disk: Path, sample_shards: Path, empty_store: Path, tmp_path: Path
) -> None:
    """Everything but the last checkpoint is something that a run can do without. Before and after, it is one rank."""
    shutil.copy(empty_store, small_disk / "mlflow.db")
    assert train.main(arguments(sample_shards, small_disk, 2)) == 0
    before = {name: (small_disk / "full" / name).read_text() for name in ("run.json", "config.yaml")}
    fill(small_disk)
    run_forked(train.main, [(arguments(sample_shards, small_disk, 4),)] * 2, tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert re.search(r"step 4/4", text), text[-5000:]
    for what in ("run.json, config.yaml is not written", "cannot write to", "status.json is not written"):
        assert text.count(what) == 1, (what, text[-5000:])
    assert before == {name: (small_disk / "full" / name).read_text() for name in before}, "whole, as they were"
    (small_disk / "filler").unlink()
    assert train.main(arguments(sample_shards, small_disk, 4)) == 0
    assert sorted(losses(small_disk / "full")) == [1, 2, 3, 4]
    assert json.loads((small_disk / "full" / "status.json").read_text())["event"] == "finished"
