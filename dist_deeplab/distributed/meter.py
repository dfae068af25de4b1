"""Where the time between two log lines went, and what the main thread is at."""

import contextlib
import resource
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class Meter:
    """Counts steps and the seconds spent waiting for data and for other ranks; pauses are left out.

    evaluation_s: seconds that the last evaluation took, for estimates; None: there was none yet.
    """

    def __init__(self) -> None:
        self.images_per_s_at_peak: float | None = None
        self.evaluation_s: float | None = None
        self._reset()

    def start(self, images_per_s_at_peak: float | None) -> None:
        """Begin to count: what came before was not training.

        Args:
            images_per_s_at_peak: what all devices would do if they did nothing but the network's arithmetic at their
                data sheet's rate, or None where that is not known.
        """
        self.images_per_s_at_peak = images_per_s_at_peak
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.data_s = 0.0
        self.wait_s = 0.0
        self.paused_s = 0.0
        self.started = time.perf_counter()

    def timed(self, iterable: Iterable[T]) -> Iterator[T]:
        """Yield the items, counting each as a step and the wait for it as data time."""
        iterator = iter(iterable)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.data_s += time.perf_counter() - asked
            self.steps += 1
            yield item

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for other ranks inside a step."""
        self.wait_s += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this context out: it is not training."""
        entered = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - entered

    def pop(self, *, images_per_step: int, device: torch.device) -> dict[str, float]:
        """Means since the last call, as metric points; the next window begins."""
        elapsed = max(1e-9, time.perf_counter() - self.started - self.paused_s)
        steps = max(1, self.steps)
        values = {
            "images_per_s": steps * images_per_step / elapsed,
            "time/step_s": elapsed / steps,
            "time/data_s": self.data_s / steps,
            "time/wait_s": self.wait_s / steps,
            "memory/peak_gib": peak_memory_bytes(device) / 2**30,
        }
        if self.images_per_s_at_peak:
            values["mfu"] = values["images_per_s"] / self.images_per_s_at_peak
        self._reset()
        return values


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in use: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
