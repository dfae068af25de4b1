"""How each rank spent its time between two log lines: which one the others wait for."""

import json
import logging
import statistics
from pathlib import Path

import torch

from dist_deeplab.distributed.process_group import DistEnv, all_reduce_sum
from dist_deeplab.files import NonEssentialWrites

FILE = "rank_times.jsonl"
_SLOW = 0.2  # a rank that works longer than the median rank by this fraction of the step is logged
_PARTS = ("data_s", "compute_s", "wait_s")

log = logging.getLogger(__name__)


class RankTimes:
    """Writes `logs/rank_times.jsonl`: {"step", "data_s": [rank 0, rank 1 ...], "compute_s": ..., "wait_s": ...}.

    Seconds per step as the host sees them: data is the wait for the loader; wait is how long after this rank the last
    one had its images of a step, which all wait for inside the step before; compute is the rest. (On a GPU the host
    runs ahead: there, a slow device shows as `wait` of all the others.)
    """

    def __init__(self, env: DistEnv, folder: Path) -> None:
        self.env = env
        self.path = folder / FILE
        self._writing = NonEssentialWrites(str(self.path))

    def record(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Share the meter's `time/*_s` values with all ranks (a small all-reduce); every rank must call it.

        Returns:
            The largest of each as metric points, where there are several ranks.
        """
        if self.env.world_size == 1:
            return {}
        data, wait = values["time/data_s"], values["time/wait_s"]
        table = torch.zeros(self.env.world_size, len(_PARTS), dtype=torch.float64)
        table[self.env.rank] = torch.tensor([data, values["time/step_s"] - data - wait, wait])
        columns = dict(zip(_PARTS, all_reduce_sum(table).T.tolist(), strict=True))
        self.env.on_main(self._write, step, columns, values["time/step_s"])
        return {f"time/{part.removesuffix('_s')}_max_s": max(column) for part, column in columns.items()}

    def _write(self, step: int, columns: dict[str, list[float]], step_s: float) -> None:
        rounded = {part: [round(value, 6) for value in column] for part, column in columns.items()}
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        busy = [data + compute for data, compute in zip(columns["data_s"], columns["compute_s"], strict=True)]
        slowest = busy.index(max(busy))
        if busy[slowest] - statistics.median(busy) > _SLOW * step_s:
            log.warning(
                "rank %d is the slowest: %.3f s for data and %.3f s of work per step, the median rank needs %.3f s",
                slowest,
                columns["data_s"][slowest],
                columns["compute_s"][slowest],
                statistics.median(busy),
            )
