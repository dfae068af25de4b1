"""Copies to the device that run under the compute of the step before."""

import contextlib

import torch


class DeviceCopier:
    """Copies CPU tensors to a device; on a GPU, on a stream of its own.

    The host is ahead of the GPU, so a step's copies are asked for while the GPU still computes the step before. On the
    compute stream they would queue up behind it; here they need not. What is not in pinned memory yet (the labels
    sampled for the loss) is put there: torch keeps such memory for the next step, so that costs a small copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The tensors on the device, for use on its current stream."""
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            copies = [self._pinned(tensor).to(self.device, non_blocking=True) for tensor in tensors]
        if self._stream:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self._stream)
            for copy in copies:
                copy.record_stream(compute)  # its memory is not given to another copy before compute has read it
        return copies

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory that a copy can leave on its own: for other memory the host would wait."""
        return tensor if self._stream is None or tensor.is_pinned() else tensor.pin_memory()
