"""What a configuration says happens in a real run: the whole command in this process, one rank, a few small steps."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab import evaluate as evaluate_command
from dist_deeplab import predict, train
from dist_deeplab.checkpointing.file import save_content
from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.session import Session
from dist_deeplab.errors import STOPPED_EARLY
from dist_deeplab.evaluation import validation
from dist_deeplab.evaluation.evaluator import Evaluation, evaluate
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.model import numerics
from dist_deeplab.tracking import tracker
from dist_deeplab.training import summary
from tests.commands import draw_no_figures, exit_code

SMALL = [
    *(
        "model.backbone=resnet_tiny",
        "precision.dtype=fp32",
        "data.crop_size=33",
        "data.num_workers=0",
        "batch.global_size=2",
        "optim.lr=1e-3",
    ),
    *("tracking.uri=none", "tracking.log_every=2", "eval.every=0", "eval.num_panels=0"),
]


class Runs:
    """Starts runs on drawn data in a folder of their own."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder

    def __call__(self, name: str, *arguments: str, validated: bool = False) -> int:
        data = [f"data.train={self.shards}/train.json", *([f"data.val={self.shards}/val.json"] if validated else [])]
        return exit_code(train.main, *SMALL, *data, f"output_dir={self.folder}", f"name={name}", *arguments)

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoints" / f"step_{step:08d}.pt"

    def saved(self, name: str, step: int) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self.checkpoint(name, step), weights_only=True)
        return content

    def journal(self, name: str, key: str) -> dict[int, float]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return {r["step"]: r["value"] for r in map(json.loads, lines) if r.get("key") == key}


@pytest.fixture(autouse=True)
def torchs_own_tf32() -> Iterator[None]:
    """Commands set torch's global flags; leave them as they were."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.fixture
def runs(sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    draw_no_figures(monkeypatch.setattr)
    return Runs(sample_shards, tmp_path)


@pytest.fixture
def first(runs: Runs) -> Path:
    """A checkpoint of two steps, in whose batch norms something was learnt."""
    assert runs("first", "max_steps=2") == 0
    return runs.checkpoint("first", 2)


@pytest.mark.parametrize(
    ("argument", "is_frozen"),
    [
        ("model.train_only=head", lambda name: name.startswith("backbone.")),
        ("model.batch_norm=frozen", lambda name: ".bn" in name or ".downsample.1." in name),
    ],
)
def test_what_is_to_be_frozen_is_in_a_real_run(runs: Runs, first: Path, argument: str, is_frozen: Any) -> None:
    assert runs("second", "max_steps=2", f"model.init={first}", argument) == 0
    before, after = runs.saved("first", 2)["model"], runs.saved("second", 2)["model"]
    assert {name for name in before if torch.equal(before[name], after[name])} == set(filter(is_frozen, before))
    assert 2 in runs.journal("second", "lr/head_weight")
    assert "network resnet_tiny, frozen batch norm" in (runs.folder / "second" / "logs" / "rank_0.log").read_text()


def test_a_run_says_by_what_it_weighs_the_classes_what_rate_fits_and_whether_the_cores_suffice(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "num_cores", lambda: 3)
    monkeypatch.setattr(summary, "ranks_on_host", lambda: 2)
    weights = [1.0, 0.25, *[1.0] * 10, 4.0, *[1.0] * 8]  # of aeroplane and dog
    assert runs("told", "max_steps=1", "data.num_workers=2", f"loss.class_weights={weights}") == 0
    log = (runs.folder / "told/logs/rank_0.log").read_text()
    assert "data.num_workers=2 for each of 2 ranks here is more than the 3 cores that may be used" in log
    assert "loss.class_weights: from 0.25 (aeroplane) to 4 (dog)" in log
    assert "optim.lr is 0.001; the recipe's, scaled linearly to 2 images, is 5e-05" in log


def test_a_resumed_run_continues_with_the_samples_that_come_next(runs: Runs) -> None:
    """Not with those of step 0, which would give other weights; and it ends at its last step."""
    assert runs("whole", "max_steps=3", "tracking.log_every=1") == 0
    assert runs("resumed", "max_steps=3", "tracking.log_every=1", "max_hours=1e-9") == STOPPED_EARLY
    assert runs("resumed", "max_steps=3", "tracking.log_every=1") == 0
    assert runs.journal("resumed", "train/loss") == runs.journal("whole", "train/loss")
    whole, resumed = (runs.saved(name, 3)["model"] for name in ("whole", "resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_images_of_rare_classes_are_repeated_and_a_resumed_run_continues_the_order(runs: Runs) -> None:
    repeat = "data.repeat_threshold=0.8"
    assert runs("plain", "max_steps=6") == 0
    assert runs("whole", "max_steps=6", repeat) == 0
    assert runs("resumed", "max_steps=6", repeat, "checkpoint.every=1", "max_hours=1e-9") == STOPPED_EARLY
    assert runs("resumed", "max_steps=6", repeat, "checkpoint.every=1") == 0
    weights = [runs.saved(name, 6)["model"] for name in ("plain", "whole", "resumed")]
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[1].items())
    assert not all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())
    said = (runs.folder / "whole/logs/rank_0.log").read_text()
    assert re.search(r"data\.repeat_threshold=0\.8: 16 images come some \d+ times in an epoch", said)
    assert runs("resumed", "max_steps=8", "data.repeat_threshold=0.7") == 2, "it is a part of the recipe"


def test_a_set_without_the_samples_classes_is_refused_only_where_they_are_needed(
    runs: Runs, sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.shards = shutil.copytree(sample_shards, tmp_path / "old")
    manifest = runs.shards / "train.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in values.items() if not key.startswith("classes")}))
    (runs.shards / "train.classes.npy").unlink()
    assert runs("run", "max_steps=1") == 0
    assert runs("refused", "max_steps=1", "data.repeat_threshold=0.1") == 2
    assert "add-classes train.json" in capsys.readouterr().err
    assert not (runs.folder / "refused/metrics.jsonl").exists()


def test_system_metrics_are_recorded_where_wanted_and_not_of_a_dry_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(tracker, "start_system_metrics", lambda run_dir, node: started.append(run_dir))
    assert runs("plain", "max_steps=1") == 0
    assert runs("watched", "max_steps=1", "tracking.system_metrics=true", "--dry-run") == 0
    assert not started
    assert runs("watched", "max_steps=1", "tracking.system_metrics=true") == 0
    assert started == [runs.folder / "watched"]


def test_a_run_that_is_continued_anyway_has_the_new_settings(runs: Runs, first: Path) -> None:
    new = ["optim.momentum=0.5", "optim.weight_decay=0.01", "resume_anyway=true", "model.init=other.pth"]
    assert runs("first", "max_steps=4", *new) == 0
    assert "model.init is not read by a run that resumes" in (runs.folder / "first/logs/rank_0.log").read_text()
    groups = runs.saved("first", 4)["optimizer"]["param_groups"]
    assert [group["momentum"] for group in groups] == [0.5] * 4
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01, 0.0]


@pytest.mark.parametrize("scales", [("[]", "[1.0,0.5]"), ("[1.0,0.5]", "[]")])
def test_other_scales_may_come_within_a_log_line(runs: Runs, scales: tuple[str, str]) -> None:
    before, after = (f"multi_scale.scales={each}" for each in scales)
    assert runs("run", "max_steps=4", before, "max_hours=1e-9", "tracking.log_every=3") == STOPPED_EARLY
    assert runs("run", "max_steps=4", after, "resume_anyway=true", "tracking.log_every=3") == 0
    assert sorted(runs.journal("run", "train/loss")) == [3, 4]
    parts = [runs.journal("run", f"train/loss_{name}") for name in ("fused", "scale_1", "scale_0.5")]
    if scales[1] != "[]":
        assert runs.journal("run", "train/loss")[3] == pytest.approx(sum(part[3] for part in parts))


def test_an_evaluation_that_is_cut_short_again_is_still_pending(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_during(predictor: Predictor, manifest: Manifest, session: Session, **options: Any) -> Evaluation:
        session.stop.hear("SIGTERM")
        return evaluate(predictor, manifest, session, **options)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", stop_during)
        for _ in range(2):
            assert runs("run", "max_steps=2", validated=True) == STOPPED_EARLY
            assert runs.saved("run", 2)["owes_evaluation"]
    assert not runs.journal("run", "val/mIoU")
    assert runs("run", "max_steps=4", "resume_anyway=true") == 0  # without a set there is nothing to make up for
    assert not runs.saved("run", 4)["owes_evaluation"]


def test_a_best_score_counts_for_its_folder_its_images_and_its_way_of_scoring(runs: Runs, first: Path) -> None:
    content = torch.load(first, weights_only=True) | {"best_miou": 0.99}
    save_content(first, content, step=2)
    anyway = ["max_steps=3", "resume_anyway=true"]
    assert runs("elsewhere", f"resume={first}", *anyway, validated=True) == 0
    assert runs.checkpoint("elsewhere", 3).with_name("best.pt").exists()
    assert runs("first", "eval.flip=true", *anyway, validated=True) == 0
    assert 0 <= runs.saved("first", 3)["best_miou"] < 0.99


def test_a_best_score_stays_where_a_run_continues_from_its_own_best_file_by_whatever_path(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "score", lambda *_, step: {2: 0.5, 3: 0.3}[step])
    assert runs("run", "max_steps=2", validated=True) == 0
    for file in runs.checkpoint("run", 2).parent.glob("step_*"):
        file.unlink()
    (tmp_path / "link").symlink_to(runs.folder)
    resume = f"resume={tmp_path}/link/run/checkpoints/best.pt"
    assert runs("run", "max_steps=3", "resume_anyway=true", resume, validated=True) == 0
    assert runs.saved("run", 3)["best_miou"] == 0.5


def test_a_best_score_whose_checkpoint_could_not_be_written_is_forgotten(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a lower score would leave the run without best.pt forever."""
    link_best = CheckpointFolder._link_best

    def full_at_first(folder: CheckpointFolder, path: Path, *, step: int, digest: str) -> None:
        if step == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        link_best(folder, path, step=step, digest=digest)

    monkeypatch.setattr(CheckpointFolder, "_link_best", full_at_first)
    monkeypatch.setattr(validation, "score", lambda *_, step: {1: 0.5, 2: 0.3, 3: 0.2}[step])
    assert runs("run", "max_steps=3", "eval.every=1", validated=True) == 0
    best = torch.load(runs.checkpoint("run", 2).with_name("best.pt"), weights_only=True)
    assert (best["step"], best["best_miou"]) == (2, 0.3)
    assert runs.saved("run", 3)["best_miou"] == 0.3


def test_a_best_score_is_of_its_images_also_after_a_time_without_any(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "score", lambda *_, step: {1: 0.5, 3: 0.3}[step])
    assert runs("run", "max_steps=1", validated=True) == 0
    assert runs("run", "max_steps=2", "resume_anyway=true") == 0
    assert runs.saved("run", 2)["best_miou"] == 0.5
    others = f"data.val={runs.shards}/train.json"
    assert runs("run", "max_steps=3", "resume_anyway=true", others) == 0
    assert runs.saved("run", 3)["best_miou"] == 0.3


def test_a_precision_that_was_chosen_is_kept_on_another_machine_and_used_for_scores(
    runs: Runs, first: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen bf16 on an AMX CPU; resumed and evaluated on one without."""
    autocast, used = numerics.autocast, []

    def watch(dtype: str, device: torch.device) -> Any:
        used.append(dtype)
        return autocast(dtype, device)

    monkeypatch.setattr("dist_deeplab.evaluation.inference.autocast", watch)
    for fastest, steps in (("bf16", 1), ("fp32", 2)):
        monkeypatch.setattr("dist_deeplab.training.precision.fastest_dtype", lambda device, dtype=fastest: dtype)
        assert runs("run", "precision.dtype=auto", f"max_steps={steps}", "resume_anyway=true", validated=True) == 0
        assert runs.saved("run", steps)["config"]["precision"]["dtype"] == "bf16"
    data = ("--data", sample_shards / "val.json", "--no-mlflow", "eval.num_panels=0")
    assert exit_code(evaluate_command.main, runs.checkpoint("run", 2), *data) == 0
    assert set(used) == {"bf16"}
    assert exit_code(evaluate_command.main, runs.checkpoint("run", 2), *data, "precision.dtype=fp32") == 0
    assert used[-1] == "fp32"


def test_a_dry_run_starts_from_the_weights_that_a_run_would_continue_from(runs: Runs, first: Path) -> None:
    assert runs("second", "max_steps=2", f"resume={first}", "--dry-run") == 0
    assert not (runs.folder / "second").exists()


def test_a_finished_network_is_asked_with_the_arithmetic_of_its_run(
    runs: Runs, first: Path, sample_shards: Path
) -> None:
    image = sample_shards.parent / "VOCdevkit/VOC2012/JPEGImages/sample_000000.jpg"
    commands = [
        (evaluate_command.main, ("--data", sample_shards / "val.json", "--no-mlflow", "eval.num_panels=0")),
        (predict.main, (image, "--out", runs.folder / "masks")),
    ]
    for main, arguments in commands:  # on a GPU, torch would let fp32 convolutions round to tf32, and products not
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        assert exit_code(main, first, *arguments) == 0
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_that_is_asked_for_must_be_there_and_a_cpu_is_not_asked_for_fp16(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs("run", "max_steps=1", "device=cuda") == 2
    assert "device=cuda, but torch" in capsys.readouterr().err
    assert runs("run", "max_steps=1", "precision.dtype=fp16") == 2
    assert "precision.dtype=fp16 is for GPUs" in capsys.readouterr().err
    assert runs("run", "max_steps=1", "device=cpu") == 0


def test_a_dry_run_with_a_validation_set_forecasts_its_evaluations(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("run", "max_steps=40", "eval.every=10", "--dry-run", validated=True) == 0
    said = capsys.readouterr().out
    assert "a dry run does not score them" in said and "there will be no score" not in said
    assert "40 steps would take" in said and "and 4 evaluations some" in said
