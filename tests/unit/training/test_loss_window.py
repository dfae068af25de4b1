"""The logged loss does not depend on when losses were turned into numbers, and a bad one names its step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.errors import TrainingError
from dist_deeplab.training.loss_window import LossWindow

FINITE = st.floats(-1e6, 1e6, width=32)


def _losses(*values: float, names: tuple[str, ...] = ("scale_1",)) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in zip(names, values, strict=True)}


@given(values=st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=12), data=st.data())
def test_the_mean_is_independent_of_when_reduce_was_called(
    values: list[tuple[float, float]], data: st.DataObject
) -> None:
    reduced_at = data.draw(st.sets(st.integers(1, len(values))))
    window = LossWindow()
    for step, pair in enumerate(values, start=1):
        window.add(_losses(*pair, names=("fused", "scale_1")))
        if step in reduced_at:
            window.reduce(step)
            window.reduce(step)  # nothing pending: nothing happens
    window.reduce(len(values))
    fused, full = (math.fsum(column) / len(values) for column in zip(*values))
    assert window.pop_mean() == {
        "train/loss": math.fsum([fused, full]),
        "train/loss_fused": fused,
        "train/loss_scale_1": full,
    }


def test_one_output_has_one_loss() -> None:
    window = LossWindow()
    window.add(_losses(1.0))
    window.add(_losses(2.0))
    window.reduce(2)
    assert window.pop_mean() == {"train/loss": 1.5}


def test_a_window_starts_anew_after_its_mean_was_taken() -> None:
    window = LossWindow()
    for step, value in enumerate([1.0, 3.0, 8.0], start=1):
        window.add(_losses(value))
        window.reduce(step)
        if step == 2:
            assert window.pop_mean() == {"train/loss": 2.0}
    assert window.pop_mean() == {"train/loss": 8.0}


def test_a_window_that_was_saved_and_taken_back_has_the_same_mean() -> None:
    window, resumed = LossWindow(), LossWindow()
    for step, value in enumerate([0.1, 0.2, 0.3], start=1):
        window.add(_losses(value))
        window.reduce(step)
    resumed.reduced = list(window.reduced)
    for each in (window, resumed):
        each.add(_losses(0.7))
        each.reduce(4)
    assert window.pop_mean() == resumed.pop_mean()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_loss_that_is_not_finite_names_its_step(bad: float, place: int) -> None:
    window = LossWindow()
    for _ in range(4):  # steps 0 .. 3
        window.add(_losses(1.0, 1.0, names=("fused", "scale_1")))
    window.reduce(4)
    for number in range(3):  # steps 4 .. 6
        window.add(_losses(1.0, bad if number == place else 1.0, names=("fused", "scale_1")))
    with pytest.raises(TrainingError, match=rf"loss of step {4 + place} is .*optim\.lr.*optim\.clip_norm"):
        window.reduce(7)
