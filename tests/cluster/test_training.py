"""The real training on a real Slurm of two nodes: by `sbatch slurm/train.sh`, and as one srun task per rank."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.slurm


@pytest.fixture
def environ() -> Mapping[str, str]:
    return {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


@pytest.fixture
def arguments(sample_shards: Path, tmp_path: Path) -> list[str]:
    data = [f"data.train={sample_shards}/train.json", f"data.val={sample_shards}/val.json", "data.crop_size=65"]
    small = [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.num_workers=0",
        "batch.global_size=4",
        "optim.lr=1e-3",
        "max_steps=4",
    ]
    return [*data, *small, f"output_dir={tmp_path}", "name=run", "tracking.log_every=2"]


def logged_steps(run_dir: Path) -> list[int]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record.get("key") == "train/loss"]


def test_sbatch_trains_and_evaluates_on_two_nodes(slurm, environ, arguments, sample_shards, tmp_path):
    state, output = slurm.run_job(
        "--nodes=2", str(REPO / "slurm/train.sh"), *arguments, cwd=tmp_path, REPO=str(REPO), **environ
    )
    assert state == "COMPLETED", output
    assert "2 x CPU (torchrun)" in output
    assert logged_steps(tmp_path / "run") == [2, 4]
    assert {f"rank_{rank}.log" for rank in (0, 1)} <= {path.name for path in (tmp_path / "run/logs").iterdir()}

    score = [str(tmp_path / "run/checkpoints/best.pt"), "--data", f"{sample_shards}/val.json", "--no-mlflow"]
    score += ["--json", str(tmp_path / "scores.json")]
    state, output = slurm.run_job(
        "--nodes=2", str(REPO / "slurm/evaluate.sh"), *score, cwd=tmp_path, REPO=str(REPO), **environ
    )
    assert state == "COMPLETED", output
    scores = json.loads((tmp_path / "scores.json").read_text())
    trained = json.loads(next((tmp_path / "run/eval").glob("step_*/metrics.json")).read_text())
    assert scores["num_images"] == 7
    assert scores["mIoU"] == trained["mIoU"], "on the nodes of a job, the score that training saw"


def test_one_srun_task_per_rank_trains_without_torchrun(slurm, environ, arguments, tmp_path):
    command = shlex.join([sys.executable, "-m", "dist_deeplab.train", *arguments, "tracking.uri=none"])
    job = f"--wrap=srun --kill-on-bad-exit=1 {command}"
    # The nodes of this test are names that no resolver knows; elsewhere the first node's name is the rendezvous host.
    state, output = slurm.run_job("--nodes=2", "--ntasks=2", job, cwd=tmp_path, MASTER_ADDR="127.0.0.1", **environ)
    assert state == "COMPLETED", output
    assert "2 x CPU (slurm)" in output
    assert logged_steps(tmp_path / "run") == [2, 4]
