"""A trace of some training steps that Perfetto (https://ui.perfetto.dev) and chrome://tracing show."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from dist_deeplab.logs import format_count

T = TypeVar("T")
log = logging.getLogger(__name__)

_SETTLE, _WARMUP, _STEPS = 5, 2, 4  # steps before the profiler runs, runs unrecorded (it is slow at first), records


def plan(num_steps: int) -> tuple[int, int, int]:
    """How many steps are left out, run with the profiler unrecorded, and recorded: fewer near the end of a run."""
    recorded = max(1, min(_STEPS, num_steps - _WARMUP))
    warm_up = min(_WARMUP, num_steps - recorded)
    return min(_SETTLE, num_steps - recorded - warm_up), warm_up, recorded


def profiled(steps: Iterable[T], path: Path | None, *, num_steps: int) -> Iterator[T]:
    """Yield the items of `steps`, and write a trace of what happens between some of them to `path` (None: don't).

    The first steps, in which libraries load and choose algorithms, are left out; 4 are recorded, fewer where fewer than
    11 of `num_steps` are left. Each wait for the next item is in the trace as "wait for data"; the parts of a step name
    themselves.
    """
    if path is None or num_steps < 1:
        yield from steps
        return
    settle, warm_up, recorded = plan(num_steps)
    if settle < _SETTLE:
        log.warning(
            "--profile: only %s left, so the trace is of %d that may not be typical",
            format_count(num_steps, "step is", "steps are"),
            recorded,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        log.info("trace of %s in %s: open it at https://ui.perfetto.dev", format_count(recorded, "step"), path)

    when = schedule(skip_first=settle, wait=0, warmup=warm_up, active=recorded, repeat=1)
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
