"""A frozen copy of the training state in host memory, for a writer in the background."""

import collections
from collections.abc import Iterator
from typing import Any

import torch


class Snapshot:
    """Copies nested tensors into buffers of its own, which are kept and used again: pinned ones for CUDA tensors."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, content: dict[str, Any]) -> dict[str, Any]:
        """A copy of `content`; it is good until the next call.

        Raises:
            ValueError: a tensor holds NaN or infinity, or there is something that a safe load would refuse; where.
        """
        tensors = dict(_tensors(content))
        _require_finite(tensors)
        for where, tensor in tensors.items():
            buffer = self._buffers.get(where)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                pin = tensor.device.type == "cuda"
                self._buffers[where] = buffer = torch.empty_like(tensor, device="cpu", pin_memory=pin)
            buffer.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()
        copied: dict[str, Any] = self._rebuild(content, "")
        return copied

    def _rebuild(self, value: Any, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._buffers[where]
        if isinstance(value, dict):
            copy = type(value)((key, self._rebuild(item, f"{where}.{key}")) for key, item in value.items())
            if hasattr(value, "_metadata"):  # of a module's state_dict
                copy._metadata = value._metadata  # type: ignore[attr-defined]
            return copy
        if isinstance(value, list | tuple):
            return type(value)(self._rebuild(item, f"{where}[{number}]") for number, item in enumerate(value))
        return value


def _tensors(value: Any, where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (place, tensor). Anything but tensors and exact plain types is refused: `weights_only=True` would, too."""
    if type(value) is torch.Tensor:
        yield where, value.detach()
    elif type(value) in (dict, collections.OrderedDict):
        for key, item in value.items():
            yield from _tensors(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{where}[{number}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"checkpoint{where} is a {type(value).__name__}, not a tensor or plain value")


def _require_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Check all tensors with a single wait for the device."""
    finite = {
        where: torch.isfinite(tensor).all() for where, tensor in tensors.items() if tensor.dtype.is_floating_point
    }
    if finite and not bool(torch.stack([flag.reshape(()) for flag in finite.values()]).all()):
        where = next(where for where, flag in finite.items() if not flag)
        raise ValueError(f"checkpoint{where} holds NaN or infinity")
