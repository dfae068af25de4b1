"""A step whose loss or gradient is not finite leaves no trace but a file that shows it."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.loader import Batch
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE, Preprocessing
from dist_deeplab.training import nonfinite
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.nonfinite import NonFiniteDump, NonFiniteMonitor, NonFiniteStep
from dist_deeplab.training.optim import poly_lr, set_lr
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.step import TrainStep
from tests.ranks import TwoRanks

MakeNet = Callable[..., DeepLabV2]
MakeBatch = Callable[..., Batch]
MakeStep = Callable[..., TrainStep]

POISON = 77
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1)


@dataclass(frozen=True)
class Poisoned(Preprocessing):
    """Turns an image whose first value is POISON into `value`."""

    value: float = math.nan

    def normalize(self, image: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
        clean = super().normalize(image, content)
        bad = (image[:, 0, 0, 0] == POISON).view(-1, 1, 1, 1)
        return torch.where(bad, self.value, clean)


def _poisoned(batch: Batch, where: int) -> Batch:
    batch.image[:, 0, 0, 0] = 0
    batch.image[where, 0, 0, 0] = POISON
    return batch


def _start(net: DeepLabV2, make_step: MakeStep, folder: Path, dtype: str = "fp32", value: float = math.nan) -> Any:
    update = make_step(net, dtype=dtype, optim=OPTIM)
    update.preprocessing = Poisoned(CAFFE.channels, CAFFE.mean, CAFFE.std, value)
    window = LossWindow(NonFiniteMonitor(3, NonFiniteDump(folder, {"config": {"seed": 1}}, rank=0)))
    return TrainState(net, update.optimizer, update.precision, window), update


def _train(state: TrainState, update: TrainStep, steps: list[list[Batch]]) -> None:
    for batches in steps:
        set_lr(update.optimizer, poly_lr(state.schedule_step, OPTIM, max_steps=10))
        state.advance(update(batches), batches)
    state.losses.reduce(state.step)


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    momenta = {f"momentum of {n}": state.optimizer.state[p] for n, p in state.net.named_parameters()}
    buffers = {name: values["momentum_buffer"] for name, values in momenta.items() if values}
    return {**state.net.state_dict(), **buffers}


@pytest.mark.parametrize(
    ("dtype", "batch_norm", "bad_step"),
    [("fp32", "sync", 0), ("fp32", "frozen", 2), ("bf16", "sync", 2), ("fp16", "frozen", 0)],
)
def test_a_bad_step_leaves_weights_momentum_statistics_and_schedule_as_if_it_had_not_been(
    make_net: MakeNet,
    make_batch: MakeBatch,
    make_step: MakeStep,
    tmp_path: Path,
    dtype: str,
    batch_norm: str,
    bad_step: int,
) -> None:
    steps = [[make_batch([0.1], seed=10 * s + m) for m in range(2)] for s in range(3)]
    bad = [make_batch([0.1], seed=99), _poisoned(make_batch([0.1], seed=98), 0)]
    disturbed = _start(make_net(batch_norm), make_step, tmp_path, dtype)
    _train(*disturbed, [*steps[:bad_step], bad, *steps[bad_step:]])
    plain = _start(make_net(batch_norm), make_step, tmp_path, dtype)
    _train(*plain, steps)
    assert (disturbed[0].step, int(disturbed[0].num_skipped)) == (4, 1)
    assert disturbed[0].losses.monitor.num_nonfinite == 1
    expected = _tensors(plain[0])
    for name, value in _tensors(disturbed[0]).items():
        if dtype == "fp16" and value.is_floating_point():  # the scale was halved: denormal numbers differ
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(value, expected[name]), name


def test_a_loss_that_is_not_finite_is_skipped_even_where_its_gradient_is(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep
) -> None:
    """A probability that rounds to 0 gives an infinite loss with a gradient of 1."""
    update = make_step(make_net())
    parameter = next(update.model.net.head.parameters())
    before = parameter.detach().clone()
    loss = (parameter.sum() * 0 + 1) + torch.inf
    update.optimizer.zero_grad()
    update.precision.backward(loss)
    assert update.precision.step(update.optimizer, 0.0)[0]
    assert torch.equal(parameter, before)


def test_the_samples_of_a_bad_step_are_saved_with_what_is_known_about_it(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, tmp_path: Path, caplog: Any
) -> None:
    good, bad = make_batch([0.1, 0.3], seed=1), _poisoned(make_batch([0.2, 0.4], seed=2), 0)
    bad.keys[:] = ["2007_000001", "2007_000002"]
    state, update = _start(make_net(), make_step, tmp_path / "nonfinite")
    with caplog.at_level(logging.WARNING):
        _train(state, update, [[good, good], [good, bad], [good, good]])
    (record,) = caplog.records
    for text in ("step 1: loss nan", "gradient norm nan", "2007_000001 (rank 0), 2007_000002 (rank 0)", "skipped"):
        assert text in record.message
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == [
        "step_00000001_rank_0.json",
        "step_00000001_rank_0.pt",
    ]
    saved = torch.load(tmp_path / "nonfinite" / "step_00000001_rank_0.pt", weights_only=True)
    assert saved["micro_batches"] == [1]  # the other one is innocent
    assert saved["keys"] == [["2007_000001", "2007_000002"]]
    for name in ("image", "label", "content"):
        assert torch.equal(saved[name][0], getattr(bad, name))
    about = json.loads((tmp_path / "nonfinite" / "step_00000001_rank_0.json").read_text())
    assert about["losses"] == {"scale_1": "nan"}
    assert about["micro_losses"][1] == "nan"
    assert math.isfinite(about["micro_losses"][0])
    assert (about["step"], about["rank"], about["grad_norm"], about["config"]) == (1, 0, "nan", {"seed": 1})
    assert about["keys"] == saved["keys"]


def test_an_infinite_gradient_of_finite_losses_saves_all_samples(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, tmp_path: Path
) -> None:
    state, update = _start(make_net(), make_step, tmp_path)
    head = next(update.model.net.head.parameters())
    hook = head.register_hook(lambda gradient: gradient * math.inf)
    _train(state, update, [[make_batch([0.1]), make_batch([0.2])]])
    hook.remove()
    saved = torch.load(tmp_path / "step_00000000_rank_0.pt", weights_only=True)
    assert saved["micro_batches"] == [0, 1]
    assert all(map(math.isfinite, saved["micro_losses"]))


@pytest.mark.parametrize(
    ("bad", "saved"),
    [({1: [1]}, {1: [1]}), ({0: [0], 1: [0, 1]}, {0: [0], 1: [0, 1]}), ({}, {0: [0, 1], 1: [0, 1]})],
    ids=["of one rank", "of both", "none, the gradient is infinite"],
)
def test_each_rank_saves_its_own_bad_samples_and_nothing_where_only_another_has_any(
    make_batch: MakeBatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    bad: dict[int, list[int]],
    saved: dict[int, list[int]],
) -> None:
    """bad, saved: numbers of micro-batches per rank."""
    ranks = TwoRanks()
    monkeypatch.setattr(nonfinite, "gather_to_all", ranks.gather)

    def skip_a_step(env: DistEnv) -> None:
        monitor = NonFiniteMonitor(3, NonFiniteDump(tmp_path, {}, env.rank))
        batches = [make_batch([0.1], seed=number) for number in range(2)]
        keys = [[f"rank_{env.rank}_{number}"] for number in range(2)]
        losses = [math.nan if number in bad.get(env.rank, []) else 0.5 for number in range(2)]
        monitor.hold(7, batches, torch.tensor(True))
        row = {"losses": {"scale_1": math.nan if bad else 1.0}, "grad_norm": math.inf, "loss_scale": 1.0}
        monitor.check(7, NonFiniteStep(row, losses, keys))

    with caplog.at_level(logging.WARNING):
        ranks.run(skip_a_step)
    files = {rank: tmp_path / f"step_00000007_rank_{rank}.pt" for rank in saved}
    assert sorted(tmp_path.glob("*.pt")) == sorted(files.values())
    for rank, file in files.items():
        assert torch.load(file, weights_only=True)["micro_batches"] == saved[rank]
    named = ", ".join(f"rank_{rank}_{number} (rank {rank})" for rank in bad for number in bad[rank])
    assert len(caplog.records) == 2
    assert all((f"samples {named}" if bad else "the gradient is not") in record.message for record in caplog.records)


def test_good_steps_save_nothing_and_are_let_go(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, tmp_path: Path
) -> None:
    state, update = _start(make_net(), make_step, tmp_path / "nonfinite")
    dump = state.losses.monitor.dump
    assert dump is not None
    for _ in range(5):
        batches = [make_batch([0.1])]
        state.advance(update(batches), batches)
    assert len(dump._held) == 1  # the last one: nobody has asked for its flag yet
    state.losses.reduce(state.step)
    assert dump._held == []
    assert not (tmp_path / "nonfinite").exists()


def test_a_disk_that_refuses_the_dump_does_not_stop_the_run(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    state, update = _start(make_net(), make_step, tmp_path / "file" / "nonfinite")
    with caplog.at_level(logging.WARNING):
        _train(state, update, [[_poisoned(make_batch([0.1]), 0)], [make_batch([0.1])]])
    assert "could not save the samples of step 0" in caplog.text
    assert state.losses.monitor.in_a_row == 0


def test_a_run_that_goes_bad_over_and_over_does_not_fill_the_disk(make_batch: MakeBatch, tmp_path: Path) -> None:
    dump = NonFiniteDump(tmp_path, {}, rank=3)
    for step in range(40):
        dump.hold(step, [make_batch([0.1])], torch.tensor(True))
        dump.save(step, [0], {})
    assert len(list(tmp_path.glob("*_rank_3.pt"))) == 16


def test_of_many_bad_steps_only_a_few_hold_their_images(make_batch: Callable[..., Batch], tmp_path: Path) -> None:
    dump = NonFiniteDump(tmp_path, {}, rank=0)
    for step in range(20):
        dump.hold(step, [make_batch([0.1])], torch.tensor(True))
    written = [step for step in range(20) if dump.save(step, [0], {})]
    assert written == [0, 1, 2, 3, 19], "the first few, and the last one, whose flag nobody has asked yet"
