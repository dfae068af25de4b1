"""A step on the device `meta`, which stands for a GPU: its tensors cannot be read, nor mixed with those of the CPU.

So whatever would make the host wait for a GPU, and whatever was forgotten on the CPU, is an error here too.
"""

import contextlib
from typing import Any

import pytest
import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.distributed.parallel import place_model
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.nonfinite import NonFiniteMonitor
from dist_deeplab.training.optim import build_optimizer, poly_lr, set_lr
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.step import TrainStep

META = torch.device("meta")


class MetaPrecision(Precision):
    """Float32 there; torch has no autocast for it."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _state_and_step(batch_norm: str, *, recompute: bool, clip_norm: float) -> tuple[TrainState, TrainStep]:
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory(batch_norm), recompute=recompute)
    model = place_model(MultiScale(net, (1.0, 0.5)), META).train()
    optimizer, precision = build_optimizer(net, OptimConfig()), MetaPrecision("fp32", META)
    # There is no fused kernel for meta; it would get these.
    optimizer.step = lambda: [  # type: ignore[method-assign]
        torch.zeros((), device=META) + tensor for tensor in (optimizer.found_inf, optimizer.param_groups[0]["lr"])
    ]
    # Batch norm does not matter for it: frozen goes with weights of pixels, which are copied to the device too.
    loss = CrossEntropy(255, (0.5, 1.0, 2.0, 1.0, 1.0), "images") if batch_norm == "frozen" else CrossEntropy(255)
    state = TrainState(net, optimizer, precision, LossWindow(NonFiniteMonitor()))
    return state, TrainStep(model, optimizer, precision, CAFFE, loss, clip_norm)


@pytest.mark.quick("P10")
@pytest.mark.parametrize(
    ("batch_norm", "recompute", "clip_norm"), [("sync", False, 1.0), ("local", True, 0.0), ("frozen", True, 1.0)]
)
def test_a_turn_of_the_loop_reads_nothing_from_the_device(
    batch_norm: str, recompute: bool, clip_norm: float, make_batch: Any
) -> None:
    state, step = _state_and_step(batch_norm, recompute=recompute, clip_norm=clip_norm)
    batches = [make_batch([0.1, 0.5]), make_batch([1.0, 0.0])]
    for _ in range(2):
        rates = set_lr(state.optimizer, poly_lr(state.schedule_step, OptimConfig(), max_steps=10))
        result = step(batches)
        state.advance(result, batches)
    assert {loss.device for loss in (*result.losses.values(), *result.micro_losses)} == {META}
    assert {tensor.device for tensor in (result.grad_norm, result.skipped, *rates.values())} == {META}


def test_reading_a_result_or_mixing_it_with_the_cpus_is_an_error_there(make_batch: Any) -> None:
    _, step = _state_and_step("sync", recompute=False, clip_norm=0.0)
    result = step([make_batch([0.1, 0.5])])
    with pytest.raises(RuntimeError, match="meta"):
        bool(result.skipped)
    with pytest.raises(RuntimeError, match="meta"):
        result.micro_losses[0] + torch.zeros(3)
