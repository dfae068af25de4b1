"""A few numbers summed over the ranks while the device computes: asked for before a step, read after it."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from dist_deeplab.distributed.parallel import separate_group
from dist_deeplab.distributed.process_group import get_world_size


class PendingSums(Protocol):
    """Sums over the ranks that may not have arrived yet."""

    def on_device(self) -> torch.Tensor:
        """float64 [n] for use on the device's current stream, which waits for them; on a GPU the host does not."""

    def read(self) -> list[float]:
        """The sums; the host waits for them."""

    def wait_s(self) -> float:
        """Seconds from this rank's start to that of the last rank; the host waits for the sums."""


class RankSums:
    """Starts sums over the ranks that nothing waits for; the same values start on all ranks in the same order.

    On GPUs they travel by NCCL, in a process group and on a stream of their own: in those of the gradients they would
    queue up behind the compute of the step before. On CPUs one of gloo's threads adds them up.
    """

    def __init__(self, device: torch.device) -> None:
        """Every rank must make one, as it opens a process group."""
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._group = separate_group(device) if self._stream else None

    def start(self, values: Sequence[float]) -> PendingSums:
        """The sums of `values`, on their way; float64, which holds numbers of pixels exactly. Every rank calls it."""
        own = torch.tensor(values, dtype=torch.float64)
        if self._stream is None:
            return SumsOnHost(own, self.device)
        return SumsOnStream(own, self.device, self._stream, self._group)


class SumsOnHost:
    """Sums that gloo adds up, or those of the only rank."""

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self._values, self._device = values, device
        self._started = self._ended = time.perf_counter()
        self._work = dist.all_reduce(values, async_op=True) if get_world_size() > 1 else None
        if self._work is not None:
            self._work.get_future().then(self._end)

    def _end(self, _: object) -> None:
        self._ended = time.perf_counter()

    def on_device(self) -> torch.Tensor:
        self._wait()
        return self._values.to(self._device)

    def read(self) -> list[float]:
        self._wait()
        return list(self._values.tolist())

    def wait_s(self) -> float:
        self._wait()
        return self._ended - self._started

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()


class SumsOnStream:
    """Sums that NCCL adds up, or those of the only rank, on a stream of their own."""

    def __init__(
        self, values: torch.Tensor, device: torch.device, stream: torch.cuda.Stream, group: dist.ProcessGroup | None
    ) -> None:
        self._began, self._summed = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._copied = torch.cuda.Event()
        with torch.cuda.stream(stream):
            self._sums = values.pin_memory().to(device, non_blocking=True)
            self._began.record()
            if group is not None:
                dist.all_reduce(self._sums, group=group)
            self._summed.record()
            self._host = self._sums.to("cpu", non_blocking=True)  # into pinned memory
            self._copied.record()

    def on_device(self) -> torch.Tensor:
        current = torch.cuda.current_stream(self._sums.device)
        current.wait_event(self._summed)
        self._sums.record_stream(current)  # its memory is not used again before compute has read it
        return self._sums

    def read(self) -> list[float]:
        self._copied.synchronize()
        return list(self._host.tolist())

    def wait_s(self) -> float:
        self._copied.synchronize()
        return self._began.elapsed_time(self._summed) / 1e3  # CUDA counts in ms
