"""The doctor on two real ranks: a sound machine passes, a missing shard fails with its name and exit code 1."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Run

pytestmark = pytest.mark.distributed


def test_a_sound_machine_passes_and_a_missing_shard_is_found(
    run_ranks: Run, sample_shards: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(sample_shards, tmp_path / "shards")
    command = ["-m", "dist_deeplab.doctor", f"data.train={shards}/train.json", f"output_dir={tmp_path}/runs"]
    done = run_ranks(2, *command)
    assert done.returncode == 0, done.stderr
    for what in ("code", "libraries", "devices", "all-reduce (gloo)", "shared disk", "data.train"):
        assert f"ok       {what}" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []

    (shards / "train-000001.tar").unlink()
    done = run_ranks(2, *command)
    assert done.returncode == 1
    assert "exitcode  : 1" in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "data.train" in line)
    assert line.startswith("FAILED")
    assert "train-000001.tar" in line
