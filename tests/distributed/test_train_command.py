"""The main job as users run it: torchrun, kill, resume, evaluate; and what wrong input says."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dist_deeplab import evaluate as command_evaluate
from dist_deeplab import train
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed import run_lock
from dist_deeplab.distributed.session import Session
from dist_deeplab.evaluation import validation
from dist_deeplab.evaluation.evaluator import Evaluation, evaluate
from dist_deeplab.evaluation.inference import Predictor
from tests.commands import draw_no_figures
from tests.conftest import Run, command_environ, torchrun_command
from tests.distributed.disturbed_run import KILLED, Fault, start
from tests.distributed.forked_ranks import run_forked

pytestmark = pytest.mark.distributed

SMALL = [
    *(
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.crop_size=65",
        "data.num_workers=1",
        "batch.global_size=4",
        "optim.lr=1e-3",
    ),
    *("max_steps=12", "tracking.log_every=3", "checkpoint.every=4", "eval.every=8", "eval.num_panels=2"),
]


def run_arguments(shards: Path, output_dir: Path, name: str) -> list[str]:
    """The arguments of a small run."""
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json"]
    return [*data, f"output_dir={output_dir}", f"name={name}", *SMALL]


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path, key: str) -> dict[int, float]:
    """{step: value}, after checking that no step is there twice."""
    points = [(r["step"], r["value"]) for r in read_journal(run_dir) if r.get("key") == key]
    assert len(dict(points)) == len(points), f"{key} has a step twice: {points}"
    return dict(points)


def weights_at(step: int, run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)["model"]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """How far apart two sets of weights and statistics are, all tensors as one vector."""
    assert a.keys() == b.keys()
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a) ** 0.5)


@pytest.fixture(autouse=True)
def _no_figures_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_no_figures(monkeypatch.setattr)


@pytest.fixture(scope="module")
def undisturbed(sample_shards: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks that nothing happened to, with MLflow in SQLite."""
    out = tmp_path_factory.mktemp("runs")
    shutil.copy(empty_store, out / "mlflow.db")
    command = torchrun_command(2, "-m", "dist_deeplab.train", *run_arguments(sample_shards, out, "run"))
    done = subprocess.run(command, env=command_environ(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return out / "run"


def test_a_run_leaves_what_its_folder_promises(undisturbed: Path) -> None:
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/{stem}.{end}" for stem in ("step_00000012", "best") for end in ("pt", "json")}
    images = {f"eval/step_00000012/{name}" for name in ("metrics.json", "confusion.png", "iou.png", "panels.png")}
    assert checkpoints | images | {"config.yaml", "run.json", "metrics.jsonl"} <= names
    assert {"logs/rank_0.log", "logs/rank_1.log"} <= names
    assert sorted(curve(undisturbed, "train/loss")) == [3, 6, 9, 12]
    assert sorted(curve(undisturbed, "val/mIoU")) == [8, 12]


def test_mlflow_holds_the_run(undisturbed: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{undisturbed.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("dist_deeplab")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.power"] == "0.9"
    assert run.data.params["batch.global_size"] == "4"
    assert run.data.tags["world_size"] == "2"
    history = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert history == curve(undisturbed, "train/loss")
    assert {"val/mIoU", "val/iou/background", "lr/backbone", "lr/head_bias", "images_per_s"} <= run.data.metrics.keys()
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id, "eval/step_00000012")}
    assert {f"eval/step_00000012/{name}.png" for name in ("confusion", "iou", "panels")} <= artifacts
    assert [a.path for a in client.list_artifacts(run.info.run_id) if not a.is_dir] == ["config.yaml", "curves.png"]
    assert {dataset.tags[0].value for dataset in run.inputs.dataset_inputs} == {"training", "validation"}


def test_a_finished_run_has_nothing_to_do(undisturbed: Path, sample_shards: Path, capsys: Any) -> None:
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert train.main(run_arguments(sample_shards, undisturbed.parent, "run")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_evaluate_gives_the_scores_of_the_training_run(undisturbed: Path, sample_shards: Path, capsys: Any) -> None:
    """In one process, those of a training on two ranks."""
    checkpoint = undisturbed / "checkpoints" / "step_00000012.pt"
    out = undisturbed.parent / "report"
    assert command_evaluate.main([str(checkpoint), "--data", f"{sample_shards}/val.json", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "aeroplane" in printed
    assert "mIoU" in printed
    during_training = json.loads((undisturbed / "eval/step_00000012/metrics.json").read_text())
    scores = json.loads((out / "metrics.json").read_text())
    assert {key: scores[key] for key in during_training} == during_training


@pytest.mark.quick("P5")
def test_a_killed_run_continues_to_the_same_weights_and_curve(
    undisturbed: Path, sample_shards: Path, tmp_path: Path
) -> None:
    """SIGKILL of a rank after step 6, whose checkpoint is step 4.

    (On other numbers of ranks: test_blocks.py; at any moment and under torchrun: test_killer.py.)
    """
    arguments = [*run_arguments(sample_shards, tmp_path, "run"), "tracking.uri=none"]
    folder, log = tmp_path / "run", tmp_path / "log"
    assert start(arguments, folder, log, fault=Fault("kill", "step", 5, rank=1), ranks=2) == KILLED
    assert start(arguments, folder, log, ranks=2) == 0, log.read_text()
    assert "from step 4 to 12" in log.read_text()
    assert distance(weights_at(12, tmp_path / "run"), weights_at(12, undisturbed)) == 0
    for key in ("train/loss", "lr/head_weight", "val/mIoU"):
        assert curve(tmp_path / "run", key) == curve(undisturbed, key)


def test_sigterm_saves_and_the_next_start_continues(sample_shards: Path, tmp_path: Path) -> None:
    arguments = [*run_arguments(sample_shards, tmp_path, "run"), "tracking.uri=none", "checkpoint.every=1000"]
    command = [sys.executable, "-m", "dist_deeplab.train", *arguments]
    with subprocess.Popen(command, env=command_environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for_step(tmp_path / "run", 3)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 75, output
    assert "continues from there" in output
    assert len(list((tmp_path / "run/checkpoints").glob("step_*.pt"))) == 1
    assert train.main(arguments) == 0
    assert sorted(curve(tmp_path / "run", "train/loss")) == [3, 6, 9, 12]


def test_sigterm_to_torchrun_saves_too(sample_shards: Path, tmp_path: Path) -> None:
    """Once, after the same step on both ranks; that a run continues from there, the tests beside this one show."""
    arguments = [*run_arguments(sample_shards, tmp_path, "run"), "tracking.uri=none", "checkpoint.every=1000"]
    command = torchrun_command(2, "-m", "dist_deeplab.train", *arguments)
    with subprocess.Popen(command, env=command_environ(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as agent:
        wait_for_step(tmp_path / "run", 3)
        agent.send_signal(signal.SIGTERM)
        output = agent.communicate(timeout=120)[0].decode()
    assert re.search(r"stopped \(\w+.*\), saved step \d+; the same command continues from there", output), output
    assert len(list((tmp_path / "run/checkpoints").glob("step_*.pt"))) == 1


def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(
    undisturbed: Path, sample_shards: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def stop_during(predictor: Predictor, manifest: Manifest, session: Session, **options: Any) -> Evaluation:
        session.stop.hear("SIGTERM")
        return evaluate(predictor, manifest, session, **options)

    shutil.copytree(undisturbed / "checkpoints", tmp_path / "run/checkpoints")
    for path in [*(tmp_path / "run/checkpoints").glob("step_00000012.*"), *tmp_path.glob("run/checkpoints/best.*")]:
        path.unlink()
    arguments = [*run_arguments(sample_shards, tmp_path, "run"), "tracking.uri=none", "eval.every=10"]
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", stop_during)
        assert train.main(arguments) == 75
    assert not curve(tmp_path / "run", "val/mIoU")
    assert (tmp_path / "run/checkpoints/step_00000010.pt").exists()
    assert train.main(arguments) == 0
    assert sorted(curve(tmp_path / "run", "val/mIoU")) == [10, 12]
    assert (tmp_path / "run/checkpoints/best.pt").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_sample_is_named_in_one_sentence(
    sample_shards: Path, tmp_path: Path, capsys: Any, num_workers: int
) -> None:
    for file in sample_shards.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for shard in tmp_path.glob("train-*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x89JNG"))
    arguments = [*run_arguments(tmp_path, tmp_path, "run"), "tracking.uri=none", f"data.num_workers={num_workers}"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sample 'sample_0000")
    assert ".tar is damaged: its bytes do not have the checksum of the index" in error
    assert error.count("\n") == 1


def test_a_second_run_in_the_same_folder_is_refused(
    sample_shards: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.5)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        assert train.main(run_arguments(sample_shards, tmp_path, "run")) == 2
    assert "another run is working in" in capsys.readouterr().err


def test_resume_from_elsewhere_starts_a_new_folder_and_then_its_own_checkpoints_count(
    undisturbed: Path, sample_shards: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for end in ("pt", "json"):  # best is of step 8 or 12
        shutil.copy(undisturbed / f"checkpoints/best.{end}", elsewhere)
    step = json.loads((elsewhere / "best.json").read_text())["step"]
    arguments = [*run_arguments(sample_shards, tmp_path, "new"), "tracking.uri=none", f"resume={elsewhere}/best.pt"]
    assert train.main(arguments) == 0
    log = (tmp_path / "new/logs/rank_0.log").read_text()
    assert f"from step {step} to 12" in log
    if step < 12:
        assert train.main(arguments) == 0
        assert "from step 12 to 12" in (tmp_path / "new/logs/rank_0.log").read_text()


def test_an_output_folder_that_cannot_be_is_named(sample_shards: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert train.main(run_arguments(sample_shards, tmp_path / "file", "run")) == 2
    error = capsys.readouterr().err
    assert f"cannot write to the run's folder {tmp_path}/file/run" in error
    assert error.count("\n") == 1


def test_another_recipe_under_the_same_name_is_refused(undisturbed: Path, sample_shards: Path, capsys: Any) -> None:
    arguments = run_arguments(sample_shards, undisturbed.parent, "run")
    assert train.main([*arguments, "optim.power=1.0", "max_steps=20"]) == 2
    error = capsys.readouterr().err
    assert "max_steps: 12 -> 20" in error
    assert "optim.power: 0.9 -> 1.0" in error
    assert "resume_anyway=true" in error


def test_another_recipe_is_taken_where_told_so_and_another_network_is_not(
    undisturbed: Path, sample_shards: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(undisturbed / "checkpoints", tmp_path / "run/checkpoints")
    arguments = [*run_arguments(sample_shards, tmp_path, "run"), "tracking.uri=none", "resume_anyway=true"]
    assert train.main([*arguments, "model.backbone=resnet50"]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint of step 12 does not fit this network" in error
    assert "model.init" in error
    assert error.count("\n") == 1
    assert train.main([*arguments, "max_steps=14"]) == 0
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    assert "with a change: max_steps: 12 -> 14" in log
    assert "from step 12 to 14" in log


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 120) -> None:
    """Wait until the journal holds a point of `step` or later."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        journal = run_dir / "metrics.jsonl"
        if journal.exists():
            complete = journal.read_text().splitlines()[:-1]  # the last line may be half written
            if any(json.loads(line).get("step", 0) >= step for line in complete):
                return
        time.sleep(0.02)
    raise AssertionError(f"{run_dir} did not reach step {step}")


# --- wrong input: one sentence, exit code 2, nothing written ----------------------------------------------------------


@pytest.mark.quick("P6")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["no training data", " shards --voc-root", "data.train="]),
        (
            ["data.train=nowhere/train.json"],
            [
                "no manifest at nowhere/train.json",
                " shards` makes one from VOC folders, folders of images and masks, or lists",
            ],
        ),
        (["data.train={shards}/train.json", "data.num_classes=5"], ["21 classes", "data.num_classes=21"]),
        (["data.train={shards}/train.json", "data.ignore_label=0"], ["255, not 0", "data.ignore_label=255"]),
        (["data.train={shards}/train.json", "model.init=nowhere.pth"], ["no weights file at nowhere.pth"]),
        (["data.train={shards}/train.json", "model.sync_bn=torch"], ["CUDA only", "model.sync_bn=own"]),
        (["data.train={shards}/train.json", "resume=nowhere.pt"], ["no checkpoint at nowhere.pt"]),
        (["optim.learning_rate=1"], ["unknown configuration key", "'optim.lr'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "recipes of the package: quickstart"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    sample_shards: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, arguments: list[str], says: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(shards=sample_shards) for argument in arguments]
    assert train.main([*filled, f"output_dir={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "more than one line"
    for text in says:
        assert text in error
    assert not list((tmp_path / "runs").rglob("*.pt"))


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_half_set_environment_is_named(capsys: Any, monkeypatch: Any, missing: str) -> None:
    complete = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    assert train.main([]) == 2
    assert f"not {missing}" in capsys.readouterr().err


def test_wrong_input_on_several_ranks_is_printed_once_and_no_rank_hangs(run_ranks: Run, sample_shards: Path) -> None:
    arguments = [f"data.train={sample_shards}/train.json", "batch.global_size=2"]
    result = run_ranks(3, "-m", "dist_deeplab.train", *arguments, timeout_s=150)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, result.stderr
    assert "batch.global_size=2 is too few images for 3 processes" in lines[0]
    assert "batch.global_size=3 or more" in lines[0]
    assert "exitcode  : 2" in result.stderr


def test_too_many_bad_samples_end_all_ranks_with_one_sentence(sample_shards: Path, tmp_path: Path) -> None:
    """Two damaged samples, one is allowed; each rank loads only some of the stream."""
    shards = shutil.copytree(sample_shards, tmp_path / "shards")
    tar = shards / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        for member in [member for member in opened if member.name.endswith(".jpg")][:2]:
            content[member.offset_data + member.size // 2] ^= 8
    tar.write_bytes(content)
    arguments = [f"data.train={shards}/train.json", f"output_dir={tmp_path}", "name=bad", "max_steps=20"]
    arguments += [
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.crop_size=33",
        "batch.global_size=4",
        "data.num_workers=1",
    ]
    arguments += ["tracking.uri=none", "data.max_bad_samples=1", "eval.every=0"]
    assert run_forked(train.main, [(arguments,)] * 2, tmp_path / "log") == 1
    assert (tmp_path / "log").read_text().count("2 samples are bad, data.max_bad_samples=1") == 1
    listed = (tmp_path / "bad" / "bad_samples.jsonl").read_text().splitlines()
    assert len(listed) == 2
