"""How much of a lead chance explains: the spread that seeds alone cause, and the standard error of a difference.

Formula. Settings i = 1..k ran with n_i seeds each and have the sample variances s_i^2 (divided by n_i - 1). All of them
estimate one spread, so they are pooled: s^2 = sum (n_i - 1) s_i^2 / sum (n_i - 1). The difference of two means has the
standard error s sqrt(1/n_1 + 1/n_2). It is within noise where it is at most t times that; t is the 97.5 % quantile of
Student's distribution with sum (n_i - 1) degrees of freedom (12.7 for one, 4.3 for two, 2.3 for eight).

Assumed: scores of one setting are normally distributed over seeds, with the same spread in every setting, and runs are
independent. Equal seeds in two settings make their runs alike rather than unlike, which makes the error too large, not
too small. Two settings are compared as if they had been named in advance; of the best of many, expect less.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN_DIGITS = 4  # of a score in 0..1; what is equal up to these is a tie


@dataclass(frozen=True)
class Lead:
    """Difference of two means, and its standard error (None: no setting ran with two seeds, so it is not known)."""

    value: float
    error: float | None = None
    limit: float | None = None
    """Largest difference, in size, that is within noise."""

    @property
    def is_tie(self) -> bool:
        """Whether nothing of it is left when shown."""
        return round(self.value, SHOWN_DIGITS) == 0

    @property
    def is_noise(self) -> bool:
        """Whether chance explains it; False where the noise is not known."""
        return self.limit is not None and abs(self.value) <= self.limit

    @property
    def is_real(self) -> bool:
        """Whether something may be concluded from it: neither a tie nor within the noise, as far as that is known."""
        return not self.is_tie and not self.is_noise


@dataclass(frozen=True)
class Noise:
    """Standard deviation that seeds alone cause, and the degrees of freedom of its estimate; 0: it is not known."""

    deviation: float
    degrees: int

    def lead(self, first: Sequence[float], second: Sequence[float]) -> Lead:
        """How far the mean of the first values is above that of the second."""
        value = statistics.fmean(first) - statistics.fmean(second)
        if not self.degrees:
            return Lead(value)
        from scipy.special import stdtrit  # 0.1 s to import

        error = self.deviation * math.sqrt(1 / len(first) + 1 / len(second))
        return Lead(value, error, float(stdtrit(self.degrees, 0.975)) * error)


def pooled_noise(samples: Sequence[Sequence[float]]) -> Noise:
    """Noise of values that are grouped by setting, one value per seed."""
    degrees = sum(len(values) - 1 for values in samples if values)
    if not degrees:
        return Noise(0.0, 0)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in samples if len(values) > 1)
    return Noise(math.sqrt(squares / degrees), degrees)
