"""Arithmetic of the forward pass behind one call signature: fp32, tf32, bf16, fp16 with a gradient scaler."""

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.profiler import record_function

from dist_deeplab.config import RunConfig
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all
from dist_deeplab.errors import UserError
from dist_deeplab.model.numerics import allow_tf32, autocast, common_dtype, fastest_dtype
from dist_deeplab.training.optim import update_unless

log = logging.getLogger(__name__)


def choose_precision(config: RunConfig, env: DistEnv, *, before: str | None) -> RunConfig:
    """The configuration with `precision.dtype: auto` decided, which is said; every rank calls it.

    Args:
        config: the run's.
        env: this rank.
        before: what the run that is resumed was decided to compute in, on whatever machine; None: a new run.

    Raises:
        UserError: fp16 on a CPU, which has no use for it: it is emulated, slower than fp32, and overflows.
    """
    if config.precision.dtype == "fp16" and env.device.type == "cpu":
        raise UserError("precision.dtype=fp16 is for GPUs; on a CPU set precision.dtype=auto, fp32 or bf16")
    if config.precision.dtype != "auto":
        return config
    if before not in (None, "auto"):
        dtype, why = before, "as before"
    elif config.precision.backend == "apex":
        dtype, why = "fp16", "apex.amp has no other"
    else:
        dtype, why = common_dtype(gather_to_all(fastest_dtype(env.device))), "what all devices of the run are made for"
    log.info("precision.dtype=auto: %s, %s", dtype, why)
    return config.model_copy(update={"precision": config.precision.model_copy(update={"dtype": dtype})})


class Precision:
    """How to run forward, backward and the optimizer step under a `precision.dtype`.

    tf32 sets torch's global matmul and convolution precision, fp32 unsets it: results must not depend on defaults.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        allow_tf32(dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for the forward pass."""
        return autocast(self.dtype, self.device)

    @record_function("backward")
    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Add the (scaled) gradient of a micro-batch's loss to the parameters'; `last`: of a step's micro-batches."""
        self.scaler.scale(propagate_nan(loss)).backward()

    @record_function("update")
    def step(self, optimizer: Optimizer, clip_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip (0: don't) and update unless the gradient is not finite.

        It is already that of all ranks, so all skip alike; nothing waits for the device.

        Returns:
            Whether the update was skipped, bool [], and the L2 norm of the whole gradient before clipping, float32 [];
            both on the device.
        """
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        skipped = ~torch.isfinite(norm)
        update_unless(optimizer, skipped)
        self.scaler.update()
        return skipped, norm

    def loss_scale(self) -> torch.Tensor:
        """Factor of the losses before backward, float32 [] on the device; 1 but for fp16."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, empty but for fp16."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; another precision's state is left alone."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def propagate_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss, made so that its gradient is NaN where it is not finite itself.

    The sum over the ranks then tells all of them about it, without a message of its own.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
