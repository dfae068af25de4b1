"""What the steps since the last log line did, kept on the device until somebody needs numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.process_group import all_reduce_sum
from dist_deeplab.training.nonfinite import NonFiniteMonitor, NonFiniteStep
from dist_deeplab.training.step import StepResult


class LossWindow:
    """Adds up nothing: every step's loss is reduced by itself and the mean is taken of plain floats.

    So it does not matter when `reduce` was called in between, and a run that was resumed inside a window logs the very
    number that an undisturbed run logs. Skipped updates are counted here; why they were skipped
    is the monitor's concern.
    """

    def __init__(self, monitor: NonFiniteMonitor) -> None:
        self.monitor = monitor
        self.rows: list[dict[str, Any]] = []
        self.num_skipped = 0
        self._pending: list[tuple[StepResult, list[list[str]]]] = []

    def add(self, step: int, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Take what step `step` did, and the micro-batches it was made of."""
        self._pending.append((result, [batch.keys for batch in micro_batches]))
        self.monitor.hold(step, micro_batches, result.skipped)

    def reduce(self, step: int) -> None:
        """Turn what is pending into numbers: one all-reduce, one wait for the device; every rank must call it.

        Args:
            step: number of steps done.

        Raises:
            TrainingError: see `NonFiniteMonitor.check`.
        """
        if not self._pending:
            return
        results = [result for result, _ in self._pending]
        names = list(results[0].losses)
        table = all_reduce_sum(torch.stack([torch.stack(list(result.losses.values())) for result in results]))
        own = [torch.stack([r.grad_norm, r.loss_scale, r.skipped.float(), *r.micro_losses]) for r in results]
        values = torch.cat([table, torch.stack(own)], dim=1).tolist()
        for number, (row, (_, keys)) in enumerate(zip(values, self._pending, strict=True), start=step - len(results)):
            losses, (norm, scale, skipped, *micro_losses) = row[: len(names)], row[len(names) :]
            self.rows.append({"losses": dict(zip(names, losses)), "grad_norm": norm, "loss_scale": scale})
            self.num_skipped += bool(skipped)
            self.monitor.check(number, NonFiniteStep(self.rows[-1], micro_losses, keys) if skipped else None)
        self._pending.clear()
        self.monitor.forget()

    def pop_mean(self) -> dict[str, float]:
        """The metrics of the window, which is emptied; a mean over finite values, NaN where there are none.

        "train/loss", "train/loss_<output>" where there are several, "train/grad_norm", and of the whole run
        "train/num_skipped" and "train/num_nonfinite" updates; with fp16 "train/loss_scale" of the last step.
        """
        names = list(self.rows[-1]["losses"])
        # A run resumed with other multi_scale.scales may have begun the window with other losses.
        self.rows = [row for row in self.rows if list(row["losses"]) == names]
        means = {name: _mean([row["losses"][name] for row in self.rows]) for name in names}
        values = {"train/loss": math.fsum(means.values())}
        if len(names) > 1:
            values |= {f"train/loss_{name}": value for name, value in means.items()}
        values["train/grad_norm"] = _mean([row["grad_norm"] for row in self.rows])
        values |= {"train/num_skipped": self.num_skipped, "train/num_nonfinite": self.monitor.num_nonfinite}
        if any(row["loss_scale"] != 1 for row in self.rows):
            values["train/loss_scale"] = self.rows[-1]["loss_scale"]
        self.rows.clear()
        return values

    def state_dict(self) -> dict[str, Any]:
        """Plain values; what is pending is not among them."""
        return {
            "rows": list(self.rows),
            "num_skipped": self.num_skipped,
            "num_nonfinite": self.monitor.num_nonfinite,
            "nonfinite_in_a_row": self.monitor.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rows = list(state["rows"])
        self.num_skipped = state["num_skipped"]
        self.monitor.num_nonfinite = state["num_nonfinite"]
        self.monitor.in_a_row = state["nonfinite_in_a_row"]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
