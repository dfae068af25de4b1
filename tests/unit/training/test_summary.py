"""What a run says about itself: the notes of its sets, and how long it will last."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dist_deeplab.config import load_config
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import build_checkpoints, split_batch
from dist_deeplab.training.run import Run
from dist_deeplab.training.summary import evaluations_left, log_progress, packing_notes


@pytest.mark.parametrize("max_steps", [1, 7, 10, 11])
@pytest.mark.parametrize("every", [0, 1, 3, 5, 10, 100])
def test_evaluations_left_are_those_that_the_loop_makes(max_steps: int, every: int) -> None:
    config = load_config(None, [f"max_steps={max_steps}", f"eval.every={every}"])
    for done in range(max_steps + 1):
        to_come = [
            step for step in range(done + 1, max_steps + 1) if step == max_steps or (every and step % every == 0)
        ]
        assert evaluations_left(config, done) == len(to_come)


def test_each_note_names_its_set(sample_shards: Path) -> None:
    train_set = replace(load_manifest(sample_shards / "train.json"), notes=("9 images turned",))
    val_set = replace(load_manifest(sample_shards / "val.json"), notes=("2 images turned",))
    assert packing_notes(train_set, val_set) == ["train: 9 images turned", "val: 2 images turned"]
    assert packing_notes(train_set, None) == ["train: 9 images turned"]


@pytest.mark.parametrize(
    ("validated", "evaluation_s", "remaining"),
    [(False, None, "10:00"), (True, None, "10:00 and 2 evaluations"), (True, 90.0, "13:00")],
)
def test_the_time_that_is_left_is_that_of_the_steps_and_evaluations_to_come(
    sample_shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    validated: bool,
    evaluation_s: float | None,
    remaining: str,
) -> None:
    """60 steps of 10 s each, and evaluations as long as the last one."""
    config = load_config(None, ["max_steps=100", "eval.every=50", f"output_dir={tmp_path}"])
    env, manifest = DistEnv(), load_manifest(sample_shards / "val.json")
    session = TrainingSession(env, rank_times=RankTimes(env, tmp_path))
    session.meter.evaluation_s = evaluation_s
    val_set = manifest if validated else None
    run = Run(
        config, env, split_batch(config, env), SCRATCH, manifest, val_set, session, build_checkpoints(config, env)
    )
    values = {"time/step_s": 10.0, "time/data_s": 1.0, "train/loss": 1.0, "lr/backbone": 1e-3, "images_per_s": 1.0}
    with caplog.at_level(logging.INFO, "dist_deeplab"):
        log_progress(run, 40, values)
    assert caplog.messages == [f"step  40/100  loss 1.0000  lr 0.001  1.0 images/s  data wait 10%  ETA {remaining}"]
