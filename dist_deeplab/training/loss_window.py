"""The losses of the steps since the last log line, kept on the device until somebody needs numbers."""

import math
from collections.abc import Mapping

import torch

from dist_deeplab.errors import TrainingError
from dist_deeplab.runtime.distributed import all_reduce_sum


class LossWindow:
    """Adds up nothing: every step's loss is reduced by itself and the mean is taken of plain floats.

    So it does not matter when `reduce` was called in between, and a run that was resumed inside a window logs the very
    number that an undisturbed run logs.
    """

    def __init__(self) -> None:
        self.reduced: list[dict[str, float]] = []
        self._pending: list[Mapping[str, torch.Tensor]] = []

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Take a step's {output name: this rank's share, float32 [] on the device}."""
        self._pending.append(losses)

    def reduce(self, step: int) -> None:
        """Turn what is pending into numbers: one all-reduce, one wait for the device; every rank must call it.

        Args:
            step: number of steps done, for the error.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self._pending:
            return
        names = list(self._pending[0])
        table = torch.stack([torch.stack([losses[name] for name in names]) for losses in self._pending])
        first_step = step - len(self._pending)
        for i, row in enumerate(all_reduce_sum(table).tolist()):
            if not all(map(math.isfinite, row)):
                raise TrainingError(
                    f"the loss of step {first_step + i} is {row}; start under another name= with a lower optim.lr or "
                    "with optim.clip_norm (the checkpoints of this run are sound)"
                )
            self.reduced.append(dict(zip(names, row, strict=True)))
        self._pending.clear()

    def pop_mean(self) -> dict[str, float]:
        """Return {"train/loss": mean over the window, "train/loss_<output>": ... where there are several}; empty it."""
        names = list(self.reduced[0])
        means = {name: math.fsum(row[name] for row in self.reduced) / len(self.reduced) for name in names}
        self.reduced.clear()
        each = {f"train/loss_{name}": value for name, value in means.items()} if len(names) > 1 else {}
        return {"train/loss": math.fsum(means.values()), **each}
