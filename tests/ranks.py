"""Ranks as threads of the test's process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_deeplab.distributed.process_group import DistEnv

TIMEOUT_S = 60.0  # a rank that fails leaves the other one waiting so long


class TwoRanks:
    """Two threads that exchange values as `gather_to_all` does between processes; put `gather` in its place."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=TIMEOUT_S)
        self._values: dict[int, Any] = {}
        self._rank = threading.local()

    def gather(self, value: Any) -> list[Any]:
        """Both ranks' values, in rank order."""
        self._values[self._rank.number] = value
        self._barrier.wait()
        gathered = [self._values[0], self._values[1]]
        self._barrier.wait()
        return gathered

    def run(self, function: Callable[[DistEnv], Any]) -> list[Any]:
        """What `function` returns on each rank."""

        def call(number: int) -> Any:
            self._rank.number = number
            return function(DistEnv(number, number, 2, "torchrun"))

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, (0, 1)))
