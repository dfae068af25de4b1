"""Overlapping windows on images that are too large to be taken whole, in packing and in prediction."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_deeplab.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Images with a longer side than `side` pixels go in windows of it that overlap by `overlap` or more."""

    side: int
    overlap: int

    def starts(self, length: int) -> list[int]:
        """Where windows begin along an axis: evenly spaced, all inside, overlapping by `overlap` or more."""
        if length <= self.side:
            return [0]
        count = -(-(length - self.side) // (self.side - self.overlap)) + 1
        return [round(number * (length - self.side) / (count - 1)) for number in range(count)]

    def needed_for(self, shape: Sequence[int]) -> bool:
        """Whether an image of height and width `shape[:2]` is too large to be taken whole."""
        return max(shape[:2]) > self.side

    def require_possible(self, what: str) -> None:
        """Check the numbers; `what` names the options in the message.

        Raises:
            UserError: windows of fewer than 33 pixels, or an overlap as large as they are.
        """
        if self.side < 33 or not 0 <= self.overlap < self.side:
            raise UserError(
                f"{what} must be 33 pixels or more, and the overlap smaller; not {self.side} and {self.overlap}"
            )


DEFAULT_WINDOWS = Windows(2049, 256)
"""Of prediction: a ResNet-101 takes an image of this side with some 10 GiB of activations in float32."""
