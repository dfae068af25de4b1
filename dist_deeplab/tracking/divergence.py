"""Whether a resumed run is the run that was interrupted: what is computed again must come out as it did."""

import logging
import math
import sys

from dist_deeplab.logs import format_count

log = logging.getLogger(__name__)


class Divergence:
    """Compares what is computed again after a resume with what the journal has; a difference is worth a warning.

    On the CPU at the same number of ranks there is none. Another number of ranks, or a GPU's faster kernels, round
    differently; anything larger means that the resumed run is not the run that was interrupted.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0.0
        self._told = (0, 0.0)

    def compare(self, key: str, step: int, known: float, value: float) -> None:
        """Take a point of the journal and the value that came now."""
        if value == known:
            return
        relative = abs(value - known) / max(abs(value), abs(known)) if math.isfinite(value) else math.inf
        self.count += 1
        if relative > 10 * self.largest:  # the first, and each that is far larger: a handful of lines at most
            log.warning(
                "after the resume %s of step %d is %.9g, but the journal has %.9g (relative difference %.1e): %s",
                key,
                step,
                value,
                known,
                relative,
                "rounding" if relative < 1e-5 else "this is not the run that was interrupted",
            )
        self.largest = max(self.largest, relative)

    def pop_news(self) -> tuple[dict[str, float], str]:
        """The count so far as metric points, and in words, where it has grown since the last call."""
        if self._told == (self.count, self.largest):
            return {}, ""
        self._told = (self.count, self.largest)
        largest = min(self.largest, sys.float_info.max)
        points = format_count(self.count, "point")
        text = f"{points} came out differently after a resume, by {self.largest:.1e} relative at most"
        return {"tracking/diverged_points": float(self.count), "tracking/divergence": largest}, text
