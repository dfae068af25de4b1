"""What the steps since the last log line did, kept on the device until somebody needs numbers."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.process_group import all_reduce_sum, gather_to_all
from dist_deeplab.errors import TrainingError
from dist_deeplab.training.nonfinite import NonFiniteDump
from dist_deeplab.training.step import StepResult

_MAX_NAMED = 8  # sample keys in a message

log = logging.getLogger(__name__)


class LossWindow:
    """Adds up nothing: every step's loss is reduced by itself and the mean is taken of plain floats.

    So it does not matter when `reduce` was called in between, and a run that was resumed inside a window logs the very
    number that an undisturbed run logs. It also counts the updates that were skipped: by fp16 whose scale was too
    large, or because a loss or gradient was not finite.
    """

    def __init__(self, *, max_nonfinite_steps: int = 1, dump: NonFiniteDump | None = None) -> None:
        self.max_nonfinite_steps = max_nonfinite_steps
        self.dump = dump
        self.rows: list[dict[str, Any]] = []
        self.num_skipped = 0
        self.num_nonfinite = 0
        self.nonfinite_in_a_row = 0
        self._pending: list[tuple[StepResult, list[list[str]]]] = []

    def add(self, step: int, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Take what step `step` did, and the micro-batches it was made of."""
        self._pending.append((result, [batch.keys for batch in micro_batches]))
        if self.dump:
            self.dump.hold(step, micro_batches, result.skipped)

    def reduce(self, step: int) -> None:
        """Turn what is pending into numbers: one all-reduce, one wait for the device; every rank must call it.

        Args:
            step: number of steps done.

        Raises:
            TrainingError: in `max_nonfinite_steps` steps in a row a loss or gradient was not finite.
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
            # A finite loss with an infinite gradient is what a too large scale of fp16 makes; it shrinks by itself.
            if skipped and not (scale > 1 and all(map(math.isfinite, losses))):
                self.num_nonfinite += 1
                self.nonfinite_in_a_row += 1
                self._report(number, self.rows[-1], micro_losses, keys)
            elif not skipped:
                self.nonfinite_in_a_row = 0
        self._pending.clear()
        if self.dump:
            self.dump.forget()

    def _report(self, step: int, row: dict[str, Any], micro_losses: list[float], keys: list[list[str]]) -> None:
        """Say which samples a bad step was made of and save them; every rank calls it, as all hold the same row."""
        bad = [number for number, loss in enumerate(micro_losses) if not math.isfinite(loss)]
        everybodys = gather_to_all([key for number in bad for key in keys[number]])
        # Where all losses were finite, the gradient was not, and any sample may be the cause.
        which = bad if any(everybodys) else list(range(len(keys)))
        saved = None
        if self.dump:
            saved = self.dump.save(step, which, {**row, "micro_losses": micro_losses})
        named = [f"{key} (rank {rank})" for rank, own in enumerate(everybodys) for key in own]
        more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        samples = (
            f"samples {', '.join(named[:_MAX_NAMED])}{more}" if named else "all losses are finite, the gradient is not"
        )
        what = f"step {step}: loss {_text(row['losses'])}, gradient norm {row['grad_norm']:g}: {samples}"
        log.warning("%s; update skipped%s", what, f", saved as {saved}" if saved else "")
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            folder = f"; look into {self.dump.folder}" if self.dump else ""
            raise TrainingError(
                f"precision.max_nonfinite_steps={self.max_nonfinite_steps} is reached, the last one {what}{folder}; "
                "start under another name= with a lower optim.lr, with optim.clip_norm or with precision.dtype=fp32 "
                "(the checkpoints of this run are sound)"
            )

    def pop_mean(self) -> dict[str, float]:
        """Return the metrics of the window and empty it; a mean over finite values, NaN where there are none.

        "train/loss", "train/loss_<output>" where there are several, "train/grad_norm", and of the whole run
        "train/num_skipped" and "train/num_nonfinite" updates; with fp16 "train/loss_scale" of the last step.
        """
        names = list(self.rows[-1]["losses"])
        # A run that resumes with other multi_scale.scales may have begun the window with other losses.
        self.rows = [row for row in self.rows if list(row["losses"]) == names]
        means = {name: _mean([row["losses"][name] for row in self.rows]) for name in names}
        values = {"train/loss": math.fsum(means.values())}
        if len(names) > 1:
            values |= {f"train/loss_{name}": value for name, value in means.items()}
        values["train/grad_norm"] = _mean([row["grad_norm"] for row in self.rows])
        values |= {"train/num_skipped": self.num_skipped, "train/num_nonfinite": self.num_nonfinite}
        if any(row["loss_scale"] != 1 for row in self.rows):
            values["train/loss_scale"] = self.rows[-1]["loss_scale"]
        self.rows.clear()
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return plain values; what is pending is not in it."""
        counts = ("num_skipped", "num_nonfinite", "nonfinite_in_a_row")
        return {"rows": list(self.rows), **{name: getattr(self, name) for name in counts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.rows = list(state["rows"])
        self.num_skipped = state["num_skipped"]
        self.num_nonfinite = state["num_nonfinite"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _text(losses: dict[str, float]) -> str:
    values = list(losses.values())
    return f"{values[0]:g}" if len(values) == 1 else ", ".join(f"{name} {value:g}" for name, value in losses.items())
