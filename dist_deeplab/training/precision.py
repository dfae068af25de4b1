"""Arithmetic of the forward pass behind one call signature: fp32, tf32, bf16, fp16 with a gradient scaler."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How to run forward, backward and the optimizer step under a `precision.dtype`.

    tf32 sets torch's global matmul and convolution precision, fp32 unsets it: results must not depend on defaults.
    """

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for the forward pass."""
        dtype = _AUTOCAST.get(self.dtype)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the (scaled) gradient of `loss` to the parameters'."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, parameters: Iterable[torch.Tensor], clip_norm: float) -> bool:
        """Clip (0: don't) and update; return False where fp16 found infinite gradients and skipped the update.

        The gradients are already those of all ranks, so all ranks skip alike.
        """
        if clip_norm:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        self.scaler.step(optimizer)
        if not self.scaler.is_enabled():
            return True
        scale = self.scaler.get_scale()
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state, empty but for fp16."""
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; another precision's state is left alone."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
