"""A grid as an array job on a real Slurm: one task for each run, then the comparison of all."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import JOB_TIMEOUT_S, wait_until
from tests.conftest import REPO

pytestmark = pytest.mark.slurm


def test_each_point_of_the_grid_is_a_task_and_the_last_job_compares_them(slurm, sample_shards: Path, tmp_path: Path):
    data = [f"data.train={sample_shards}/train.json", f"data.val={sample_shards}/val.json", "data.crop_size=65"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.num_workers=0",
        "batch.global_size=4",
        "optim.lr=1e-3",
        "max_steps=2",
    ]
    where = [f"output_dir={tmp_path}", "name=poly", "tracking.uri=none", "optim.power=0.5,2.0"]
    environ = {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "REPO": str(REPO)}
    options = ["--array-limit", "2", f"--chdir={tmp_path}"]
    said = slurm.run(str(REPO / "slurm/sweep.sh"), *options, "--", *data, *small, *where, cwd=tmp_path, **environ)
    found = re.fullmatch(r"2 runs: job (\d+); their comparison: job (\d+)\n", said)
    assert found is not None, said
    report = found[2]
    wait_until(lambda: slurm.is_over(report), 2 * JOB_TIMEOUT_S)
    output = Path(slurm.job_field(report, "StdOut")).read_text()
    assert slurm.job_field(report, "JobState") == "COMPLETED", output
    assert re.search(r"winner: power=(0\.5|2\.0), mIoU", output), output
    for power in ("0.5", "2.0"):
        about = json.loads((tmp_path / f"poly-power_{power}" / "run.json").read_text())
        assert about["parameters"]["optim.power"] == float(power)
        assert re.fullmatch(rf"{found[1]}_[01]", about["slurm_jobs"][0])
    assert (tmp_path / "poly-sweep" / "comparison.png").exists()


def test_a_grid_that_makes_no_sense_submits_nothing(slurm, tmp_path: Path):
    environ = {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(REPO), "REPO": str(REPO)}
    with pytest.raises(RuntimeError, match="no grid: give a key several values"):
        slurm.run(str(REPO / "slurm/sweep.sh"), "--", "optim.lr=0.1", cwd=tmp_path, **environ)
    with pytest.raises(RuntimeError, match="write -- between"):
        slurm.run(str(REPO / "slurm/sweep.sh"), "optim.lr=0.1,0.2", cwd=tmp_path, **environ)
    assert slurm.run("squeue", "--noheader") == ""
