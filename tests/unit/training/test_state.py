"""A run that was saved and taken back makes the next step bit by bit as if nothing had happened."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_deeplab.data.loader import Batch
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.nonfinite import NonFiniteMonitor
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.step import StepResult, TrainStep

MakeNet = Callable[..., DeepLabV2]
MakeBatch = Callable[..., Batch]
MakeStep = Callable[..., TrainStep]


def _through_a_file(content: dict[str, Any]) -> dict[str, Any]:
    """What a file of tensors and plain values gives back."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {path: leaf}."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{name}[{i}]").items()}
    return {name: value}


def _assert_identical(one: dict[str, Any], other: dict[str, Any]) -> None:
    one, other = _flat(one), _flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


@pytest.mark.quick("P5")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("batch_norm", ["sync", "frozen"])
def test_a_saved_and_restored_run_makes_a_bit_identical_next_step(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, dtype: str, batch_norm: str
) -> None:
    def start(net: DeepLabV2) -> tuple[TrainState, TrainStep]:
        update = make_step(net, dtype=dtype)
        return TrainState(net, update.optimizer, update.precision, LossWindow(NonFiniteMonitor())), update

    state, update = start(make_net(batch_norm))
    for step in range(2):
        batches = [make_batch([0.1, 0.4], seed=step)]
        state.advance(update(batches), batches)
    state.losses.reduce(state.step)
    state.update_best(0.25, "of these")
    saved = _through_a_file(state.state_dict())
    _assert_identical(saved, state.state_dict())

    other = make_net(batch_norm)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    resumed, resumed_update = start(other)
    resumed.load_state_dict(saved)
    for each, each_update in ((state, update), (resumed, resumed_update)):
        batches = [make_batch([0.1, 0.4], seed=2)]
        each.advance(each_update(batches), batches)
        each.losses.reduce(each.step)
    assert resumed.step == 3
    assert (resumed.best_miou, resumed.scored_keys_sha256) == (0.25, "of these")
    _assert_identical(resumed.state_dict(), state.state_dict())
    assert state.losses.pop_mean() == resumed.losses.pop_mean()
    assert not torch.equal(saved["model"]["head.branches.0.weight"], state.net.head.branches[0].weight)  # it did move


@pytest.fixture
def state(make_net: MakeNet, make_step: MakeStep) -> TrainState:
    net = make_net()
    update = make_step(net)
    return TrainState(net, update.optimizer, update.precision, LossWindow(NonFiniteMonitor(9)))


def test_skipped_updates_are_steps_but_do_not_advance_the_schedule(state: TrainState) -> None:
    one = torch.tensor(1.0)
    positions = []
    for skipped in (False, True, False, True, True, False):
        positions.append(int(state.schedule_step))
        state.advance(StepResult({"scale_1": one}, [one], one, one, torch.tensor(skipped), stop=False), [])
    assert positions == [0, 1, 1, 2, 2, 2]
    assert (state.step, int(state.num_skipped)) == (6, 3)
    state.losses.reduce(6)
    assert state.losses.num_skipped == 3


def test_the_schedule_of_a_resumed_run_leaves_the_same_updates_out(state: TrainState) -> None:
    """Otherwise the learning rate would jump at the resume, to that of as many steps later as were skipped."""
    one = torch.tensor(1.0)
    for skipped in (False, True, True, False, False):
        state.advance(StepResult({"scale_1": one}, [one], one, one, torch.tensor(skipped), stop=False), [])
    saved = _through_a_file(state.state_dict())
    state.step, state.num_skipped = 0, 0
    state.load_state_dict(saved)
    assert (state.step, state.num_skipped, state.schedule_step) == (5, 2, 3)


def test_the_best_score_is_the_highest_so_far(state: TrainState) -> None:
    assert [state.update_best(miou, "") for miou in (0.0, 0.3, 0.2, 0.3, 0.4)] == [True, True, False, False, True]
    assert state.best_miou == 0.4


def test_a_state_of_another_network_is_refused(state: TrainState) -> None:
    saved = state.state_dict()
    del saved["model"]["head.branches.3.bias"]
    with pytest.raises(RuntimeError, match=r"head\.branches\.3\.bias"):
        state.load_state_dict(saved)
