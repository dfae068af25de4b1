"""What a run that was disturbed must have in common with one that was undisturbed: everything."""

import hashlib
import json
from pathlib import Path

import torch
from filelock import FileLock, Timeout

CURVES = ("train/loss", "train/grad_norm", "lr/backbone", "val/mIoU")
UPLOAD_TIMEOUT_S = 120  # to send what is left once a run is done


def weights_sha256(run_dir: Path) -> str:
    """The SHA-256 of the last checkpoint's weights and momentum."""
    last = max((run_dir / "checkpoints").glob("step_*.pt"))
    content = torch.load(last, weights_only=True)
    tensors = [*content["model"].values()]
    tensors += [value["momentum_buffer"] for _, value in sorted(content["optimizer"]["state"].items())]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """{key: {step: value}}, after checking that no point is there twice."""
    found: dict[str, dict[int, float]] = {key: {} for key in CURVES}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.get("key") in CURVES:
            assert record["step"] not in found[record["key"]], f"{record} comes a second time"
            found[record["key"]][record["step"]] = record["value"]
    return found


def compare(run_dir: Path, reference: Path) -> None:
    """Check that both runs' curves and last checkpoints are the same, to the last bit."""
    assert curves(run_dir) == curves(reference), f"the curves of {run_dir} and {reference} differ"
    assert weights_sha256(run_dir) == weights_sha256(reference), f"the weights of {run_dir} and {reference} differ"


def compare_in_mlflow(run_dir: Path, reference: Path) -> None:
    """Check that the store beside `run_dir` holds one finished run for it, with each point of the reference once."""
    from mlflow import MlflowClient

    wait_for_uploaders(run_dir)
    client = MlflowClient(f"sqlite:///{run_dir.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("dist_deeplab")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run_dir.name}'")
    assert len(runs) == 1, f"MLflow has {len(runs)} runs {run_dir.name}"
    (run,) = runs
    assert run.info.status == "FINISHED", f"MLflow says that {run_dir.name} is {run.info.status}"
    assert "diverged" not in run.data.tags
    for key, expected in curves(reference).items():
        points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
        assert points == sorted(expected.items()), f"{key} of {run_dir.name} is another curve in MLflow: {points}"
    evaluations = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "eval")}
    assert evaluations == {f"eval/{path.name}" for path in (reference / "eval").iterdir()}


def wait_for_uploaders(run_dir: Path) -> None:
    """Wait until no process sends the run's journal any more."""
    try:
        with FileLock(run_dir / "mlflow.lock", timeout=UPLOAD_TIMEOUT_S):
            return
    except Timeout:
        raise AssertionError(f"{run_dir} is still being sent to MLflow after {UPLOAD_TIMEOUT_S} s") from None
