"""What a resumed run takes over from its checkpoint, and what it does not."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.config import load_config
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training import resume
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.nonfinite import NonFiniteMonitor
from dist_deeplab.training.resume import restore, save_checkpoint
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.step import StepResult, TrainStep

WITH_CRF = ["eval.crf=true", "crf.bi_w=4"]


@pytest.fixture
def state(make_net: Callable[..., DeepLabV2], make_step: Callable[..., TrainStep]) -> TrainState:
    net = make_net()
    update = make_step(net)
    return TrainState(net, update.optimizer, update.precision, LossWindow(NonFiniteMonitor(9)))


@pytest.mark.parametrize(
    ("before", "now", "is_kept"),
    [
        (WITH_CRF, [*WITH_CRF, "crf.num_workers=2", "eval.every=3", "eval.num_panels=1"], True),
        (WITH_CRF, ["eval.crf=true", "crf.bi_w=5"], False),
        (WITH_CRF, ["crf.bi_w=4"], False),
        ([], ["crf.bi_w=5"], True),  # without a CRF its settings score nothing
        ([], ["eval.flip=true"], False),
        ([], ["eval.scales=[0.5,1.0]"], False),
    ],
)
def test_a_best_score_counts_only_where_images_are_scored_as_they_were(
    state: TrainState, before: list[str], now: list[str], is_kept: bool
) -> None:
    """Else a run would compare scores of two kinds, and `best.pt` might never be replaced, or be the worse one."""
    state.best_miou = 0.5
    saved = Checkpoint(state.state_dict(), load_config(None, before), SCRATCH, ("a", "b"))
    restore(state, saved, load_config(None, now), None)
    assert state.best_miou == (0.5 if is_kept else -1.0)


@pytest.mark.parametrize(
    ("names", "keys", "contents", "difference"),
    [
        ("ab", "k", "c", []),
        ("ba", "k", "c", ["data.train: class 0: a -> b"]),
        ("abc", "k", "c", ["data.train: 2 -> 3 classes"]),
        ("ab", "other", "c", ["data.train: other samples"]),
        ("ab", "k", "other", ["data.train: other images or labels of the same names"]),
    ],
)
def test_a_resume_notices_other_classes_samples_images_and_labels(
    state: TrainState, names: str, keys: str, contents: str, difference: list[str]
) -> None:
    train_set: Any = SimpleNamespace(class_names=list(names), keys_sha256=keys, contents=contents, index_sha256="i")
    saved = Checkpoint(state.state_dict(), load_config(None, []), SCRATCH, ("a", "b"), "k", train_contents="c")
    assert resume._data_differences(saved, train_set, DistEnv()) == difference
    of_an_older_version = dataclasses.replace(saved, train_contents="")
    if contents == "other":
        assert resume._data_differences(of_an_older_version, train_set, DistEnv()) == []
        of_this_index = dataclasses.replace(saved, train_index_sha256="i")
        assert resume._data_differences(of_this_index, train_set, DistEnv()) == [], "the index is not read"


# --- what is saved ----------------------------------------------------------------------------------------------------

Save = Callable[..., dict[str, Any]]


@pytest.fixture
def save(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Function that saves `state` and gives the checkpoint's content. lost_best: the save before was in vain."""

    def save_state(*overrides: str, lost_best: bool = False) -> dict[str, Any]:
        folder = create_autospec(CheckpointFolder, instance=True)
        folder.lost_best.return_value = lost_best
        run: Any = SimpleNamespace(config=load_config(None, overrides), checkpoints=folder)
        save_checkpoint(run, state, is_best=False, wait=True)
        folder.save.assert_called_once()
        content: dict[str, Any] = folder.save.call_args.args[0]
        return content

    monkeypatch.setattr(resume, "checkpoint_of", lambda run, state: SimpleNamespace(to_content=state.state_dict))
    return save_state


def test_a_checkpoint_holds_the_losses_of_the_steps_since_the_last_log_line(state: TrainState, save: Save) -> None:
    """A run that resumes in the middle of a log line gives the mean over all its steps, as an undisturbed one does."""
    one = torch.tensor(1.0)
    for loss in (1.0, 2.0, 4.0):
        losses = {"scale_1": torch.tensor(loss)}
        state.advance(StepResult(losses, [one], one, one, torch.tensor(False), stop=False), [])
    assert [row["losses"]["scale_1"] for row in save()["losses"]["rows"]] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("batch_norm", ["local", "sync"])
def test_ranks_with_statistics_of_their_own_take_those_that_are_saved(
    batch_norm: str, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they would by a resume, which would be another run else."""

    def take_the_main_rank_s(model: DeepLabV2) -> None:
        for buffer in model.buffers():
            buffer.fill_(7)

    monkeypatch.setattr(resume, "share_buffers", take_the_main_rank_s)
    saved = save(f"model.batch_norm={batch_norm}")["model"]
    means = [value for name, value in saved.items() if name.endswith("running_mean")]
    assert all(bool((mean == 7).all()) == (batch_norm == "local") for mean in means)
    assert means


def test_a_best_score_whose_own_checkpoint_could_not_be_written_is_not_saved(state: TrainState, save: Save) -> None:
    state.best_before, state.best_miou = 0.3, 0.5
    assert save()["best_miou"] == 0.5
    assert save(lost_best=True)["best_miou"] == 0.3
