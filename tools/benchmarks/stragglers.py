"""How much longer than a usual rank the slowest of n takes: all others wait for it."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dist_deeplab.errors import UserError

_GRID = 50_000  # quantiles of a distribution given by a formula: enough for the largest of some 1,000 draws


@dataclass(frozen=True)
class Stragglers:
    """Distribution of a rank's step time as a multiple of the usual one: equally likely values in ascending order."""

    values: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stragglers":
        """The distribution of a sample."""
        return cls(tuple(sorted(values)))

    @classmethod
    def normal(cls, deviation: float) -> "Stragglers":
        """Mean 1 and that standard deviation."""
        if not deviation:
            return cls((1.0,))
        distribution = statistics.NormalDist(1.0, deviation)
        return cls(tuple(distribution.inv_cdf((i + 0.5) / _GRID) for i in range(_GRID)))

    @classmethod
    def from_rank_times(cls, path: Path) -> "Stragglers":
        """What each rank needed for data and compute in a run, as a multiple of the median rank at the same time.

        The file is a run's `logs/rank_times.jsonl`. Each of its values is a mean over the steps between two log lines,
        so what varies from step to step is averaged out: it shows slow ranks, not jitter.

        Raises:
            UserError: the file can't be read, or holds nothing of several ranks.
        """
        values: list[float] = []
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                busy = [data + compute for data, compute in zip(entry["data_s"], entry["compute_s"], strict=True)]
                usual = statistics.median(busy)
                values += [seconds / usual for seconds in busy if usual > 0 and len(busy) > 1]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} can't be read as rank times ({error}); give a run's logs/rank_times.jsonl"
            ) from None
        if not values:
            raise UserError(f"{path} holds no times of several ranks; give the file of a run with more than one rank")
        return cls.of(values)

    def expected_maximum(self, ranks: int) -> float:
        """Expected value of the largest of `ranks` independent draws.

        Of m equally likely values the i-th is the largest with probability (i/m)^n - ((i-1)/m)^n.
        """
        count = len(self.values)
        return sum(value * (((i + 1) / count) ** ranks - (i / count) ** ranks) for i, value in enumerate(self.values))


NO_STRAGGLERS = Stragglers((1.0,))
