"""A trace of some training steps that Perfetto (https://ui.perfetto.dev) and chrome://tracing show."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

T = TypeVar("T")
log = logging.getLogger(__name__)

_SETTLE, _WARMUP, _STEPS = 5, 2, 4  # steps before the profiler runs, runs unrecorded (it is slow at first), records


def profiled(steps: Iterable[T], path: Path | None) -> Iterator[T]:
    """Yield the items of `steps`, and write a trace of what happens between some of them to `path` (None: don't).

    The first steps, in which libraries load and choose algorithms, are left out; 4 are recorded. Each wait for the next
    item is in the trace as "wait for data"; the parts of a step name themselves. A run that ends earlier has no trace.
    """
    if path is None:
        yield from steps
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        log.info("trace of %d steps in %s: open it at https://ui.perfetto.dev", _STEPS, path)

    when = schedule(skip_first=_SETTLE, wait=0, warmup=_WARMUP, active=_STEPS, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as profiler:
        iterator = iter(steps)
        while True:
            try:
                with record_function("wait for data"):
                    item = next(iterator)
            except StopIteration:
                return
            yield item
            profiler.step()
