"""What a run has cost: seconds, and hours of devices, evaluations and checkpoints included."""

import time
from collections.abc import Mapping


class Cost:
    """The cost so far over all attempts, lost work included, up to the last log line of an attempt that was killed.

    Args:
        points: {(metric, step): value} of earlier attempts.
        world_size: processes, a device each.
        running_s: how long this attempt has been running already.
    """

    def __init__(self, points: Mapping[tuple[str, int], float], world_size: int, *, running_s: float = 0.0) -> None:
        self._before = {
            key: max((value for (name, _), value in points.items() if name == key), default=0.0)
            for key in ("cost/total_s", "cost/device_hours")
        }
        self._world_size = world_size
        self._opened = time.monotonic() - running_s

    def now(self) -> dict[str, float]:
        """The metric points `cost/total_s` (s) and `cost/device_hours` (processes times hours)."""
        seconds = time.monotonic() - self._opened
        return {
            "cost/total_s": self._before["cost/total_s"] + seconds,
            "cost/device_hours": self._before["cost/device_hours"] + seconds * self._world_size / 3600,
        }


class CostAtStep:
    """Holds a step's cost back until the step is over: what is logged first at a step may precede an evaluation."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._step: int | None = None
        self._values: dict[str, float] = {}

    def at(self, step: int, *, is_logged: bool) -> tuple[int, dict[str, float]] | None:
        """Note that something happens at `step`; step and points of the one before, where it is over and was logged."""
        done = None
        if step != self._step:
            done, self._step = self.pop(), step if is_logged else None
        if self._step is not None:
            self._values = self._cost.now()
        return done

    def pop(self, *, is_end: bool = False) -> tuple[int, dict[str, float]] | None:
        """Step and points that are held back, None where there are none; at the end of a run with the cost by then."""
        if self._step is None:
            return None
        done, self._step = (self._step, self._cost.now() if is_end else self._values), None
        return done
