"""Mixed precision by NVIDIA's `apex.amp`, for those who have a version with it, behind `Precision`'s signatures."""

import importlib
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_deeplab.training.apex import INSTEAD_OF_AMP, require_apex
from dist_deeplab.training.precision import Precision, propagate_nan


class ApexPrecision(Precision):
    """fp16 by `apex.amp` at level O1: torch's functions are patched, weights stay float32, the scale is dynamic.

    amp waits for the GPU once a step, to know whether gradients overflowed.
    """

    def __init__(self, device: torch.device, net: nn.Module, optimizer: Optimizer) -> None:
        """Patch torch and the optimizer; `net` is the network inside DDP.

        Raises:
            UserError: no apex that has amp.
        """
        require_apex("precision.backend=apex", "amp", INSTEAD_OF_AMP)
        super().__init__("tf32", device)  # neither torch's autocast nor its scaler
        self.amp = importlib.import_module("apex.amp")
        self.optimizer = optimizer
        self.amp.initialize(net, optimizer, opt_level="O1", verbosity=0)

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """See Precision. Gradients are unscaled and checked once, after the last micro-batch: when they are summed."""
        with self.amp.scale_loss(propagate_nan(loss), self.optimizer, delay_unscale=not last) as scaled:
            scaled.backward()

    def step(self, optimizer: Optimizer, clip_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """See Precision. Where gradients overflowed, apex has replaced `optimizer.step` by one that does nothing."""
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"])
        overflowed = self._step_is_replaced()
        skipped, norm = super().step(optimizer, clip_norm)
        if self._step_is_replaced():  # it was not called, which takes the replacement away
            optimizer.step()
        return skipped | overflowed, norm

    def _step_is_replaced(self) -> bool:
        return bool(getattr(self.optimizer._amp_stash, "already_patched", False))  # type: ignore[attr-defined]

    def loss_scale(self) -> torch.Tensor:
        """See Precision."""
        scaler = self.amp._amp_state._amp_state.loss_scalers[0]
        return torch.tensor(float(scaler.loss_scale()), device="cpu").to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Amp's state."""
        return dict(self.amp.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Precision."""
        if state:
            self.amp.load_state_dict(state)
