"""The logged loss does not depend on when losses were turned into numbers, and bad steps are counted and bounded."""

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.data.loader import Batch
from dist_deeplab.errors import TrainingError
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.nonfinite import NonFiniteMonitor
from dist_deeplab.training.step import StepResult

FINITE = st.floats(0, 1e6, width=32)
OK, NAN, OVERFLOW, LONE_INF = "ok", "a loss is NaN", "fp16's scale is too large", "fp16 overflows at a scale of 1"


def _result(*values: float, names: tuple[str, ...] = ("scale_1",), norm: float = 0.5, scale: float = 1.0) -> StepResult:
    losses = {name: torch.tensor(value) for name, value in zip(names, values, strict=True)}
    skipped = torch.tensor(not math.isfinite(norm))
    micro_losses = [torch.tensor(0.5), torch.tensor(float(sum(values)))]
    return StepResult(losses, micro_losses, torch.tensor(norm), torch.tensor(scale), skipped, stop=False)


def _step(kind: str) -> StepResult:
    loss = math.nan if kind == NAN else 1.0
    return _result(loss, norm=0.5 if kind == OK else math.inf, scale=1024.0 if kind == OVERFLOW else 1.0)


def _batches(*keys: str) -> list[Batch]:
    nothing = torch.zeros(1)
    return [Batch(nothing, nothing, nothing, [key]) for key in keys]


@given(values=st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=12), data=st.data())
def test_the_mean_is_independent_of_when_reduce_was_called(
    values: list[tuple[float, float, float]], data: st.DataObject
) -> None:
    reduced_at = data.draw(st.sets(st.integers(1, len(values))))
    window = LossWindow(NonFiniteMonitor())
    for step, (first, second, norm) in enumerate(values):
        window.add(step, _result(first, second, names=("fused", "scale_1"), norm=norm), [])
        if step + 1 in reduced_at:
            window.reduce(step + 1)
            window.reduce(step + 1)  # nothing pending: nothing happens
    window.reduce(len(values))
    fused, full, norm = (math.fsum(column) / len(values) for column in zip(*values))
    assert window.pop_mean() == {
        "train/loss": math.fsum([fused, full]),
        "train/loss_fused": fused,
        "train/loss_scale_1": full,
        "train/grad_norm": norm,
        "train/num_skipped": 0,
        "train/num_nonfinite": 0,
    }


def test_one_output_has_one_loss() -> None:
    window = LossWindow(NonFiniteMonitor())
    window.add(0, _result(1.0), [])
    window.add(1, _result(2.0), [])
    window.reduce(2)
    values = window.pop_mean()
    assert values["train/loss"] == 1.5
    assert not any(key.startswith("train/loss_") for key in values)


def test_a_window_starts_again_after_its_mean_was_taken() -> None:
    window = LossWindow(NonFiniteMonitor())
    for step, value in enumerate([1.0, 3.0, 8.0], start=1):
        window.add(step - 1, _result(value), [])
        window.reduce(step)
        if step == 2:
            assert window.pop_mean()["train/loss"] == 2.0
    assert window.pop_mean()["train/loss"] == 8.0


def test_a_window_that_was_saved_and_restored_continues_as_if_nothing_had_happened() -> None:
    window = LossWindow(NonFiniteMonitor(4))
    resumed = LossWindow(NonFiniteMonitor(4))
    for step, kind in enumerate([OK, OVERFLOW, NAN, NAN]):
        window.add(step, _step(kind), _batches("a", "b"))
        window.reduce(step + 1)
    resumed.load_state_dict(window.state_dict())
    for each in (window, resumed):
        each.add(4, _step(NAN), _batches("a", "b"))
        each.reduce(5)
    assert repr(window.state_dict()) == repr(resumed.state_dict())  # NaN does not equal itself
    assert repr(window.pop_mean()) == repr(resumed.pop_mean())
    for each in (window, resumed):
        each.add(5, _step(NAN), _batches("a", "b"))
        with pytest.raises(TrainingError):
            each.reduce(6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_that_is_not_finite_names_step_and_samples_and_is_left_out_of_the_mean(
    bad: float, place: int, caplog: Any
) -> None:
    window = LossWindow(NonFiniteMonitor(2))
    names = ("fused", "scale_1")
    window.add(0, _result(1.0, 3.0, names=names), _batches("a", "b"))
    window.reduce(1)
    losses = [1.0, 3.0]
    losses[place] = bad
    window.add(1, _result(1.0, 3.0, names=names), _batches("c", "d"))
    window.add(2, _result(*losses, names=names, norm=math.nan), _batches("e", "f"))
    window.add(3, _result(2.0, 4.0, names=names), _batches("g", "h"))
    with caplog.at_level(logging.WARNING):
        window.reduce(4)
    (record,) = caplog.records
    assert f"step 2: loss fused {losses[0]:g}, scale_1 {losses[1]:g}, gradient norm nan" in record.message
    assert "samples f (rank 0); update skipped" in record.message  # of micro-batch e the loss is finite
    values = window.pop_mean()
    assert values["train/num_skipped"] == values["train/num_nonfinite"] == 1
    sums = [4.0, 10.0]  # of the other three steps, 1 + 1 + 2 and 3 + 3 + 4
    expected = {"fused": 4.0 / 3, "scale_1": 10.0 / 3} | {names[place]: sums[place] / 3}
    other = names[1 - place]
    expected[other] = (sums[1 - place] + losses[1 - place]) / 4
    assert {name: values[f"train/loss_{name}"] for name in names} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kinds", "stops_at"),
    [
        ([NAN, NAN, OK, NAN, NAN, OK], None),
        ([OK, NAN, NAN, NAN, OK], 4),
        ([NAN, OVERFLOW, NAN, OVERFLOW, NAN], 5),  # fp16's own skipping is no good step in between
        ([OVERFLOW] * 20, None),  # and none of its own
        ([LONE_INF] * 3, 3),  # but a gradient that overflows unscaled is not finite
    ],
)
@pytest.mark.parametrize("reduce_every", [1, 2, 100])
def test_a_run_stops_after_so_many_bad_steps_in_a_row(
    kinds: list[str], stops_at: int | None, reduce_every: int
) -> None:
    window = LossWindow(NonFiniteMonitor(3))
    error = None
    for step, kind in enumerate(kinds, start=1):
        window.add(step - 1, _step(kind), _batches("a", "b"))
        if step % reduce_every == 0 or step == len(kinds):
            try:
                window.reduce(step)
            except TrainingError as caught:
                error = caught
                break
    if stops_at is None:
        assert error is None
        assert window.num_skipped == sum(kind != OK for kind in kinds)
        assert window.monitor.num_nonfinite == sum(kind in (NAN, LONE_INF) for kind in kinds)
    else:
        for text in ("precision.max_nonfinite_steps=3", f"step {stops_at - 1}:", "optim.lr", "optim.clip_norm"):
            assert text in str(error)


def test_a_window_without_a_finite_loss_has_none() -> None:
    window = LossWindow(NonFiniteMonitor(3))
    window.add(0, _step(NAN), _batches("a", "b"))
    window.reduce(1)
    values = window.pop_mean()
    assert math.isnan(values["train/loss"])
    assert math.isnan(values["train/grad_norm"])


def test_the_loss_scale_is_a_metric_of_fp16_alone() -> None:
    window = LossWindow(NonFiniteMonitor())
    window.add(0, _result(1.0), [])
    window.reduce(1)
    assert "train/loss_scale" not in window.pop_mean()
    window.add(1, _result(1.0, scale=8.0), [])
    window.add(2, _result(1.0, scale=16.0), [])
    window.reduce(3)
    assert window.pop_mean()["train/loss_scale"] == 16.0
