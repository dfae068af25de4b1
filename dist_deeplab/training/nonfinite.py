"""Steps whose loss or gradient was not finite: counted, named, their samples saved, and the run ended by too many.

The device knows that a step was bad only after the host has moved on. So the micro-batches of a step are held until its
flag has arrived by itself, and longer only if it was bad.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.process_group import gather_to_all
from dist_deeplab.errors import TrainingError, first_line

_MAX_HELD = 4  # bad steps whose images are held at a time; of more only the keys are named
_MAX_NAMED = 8  # sample keys in a message
_MAX_SAVED = 16  # files of a process: a run that goes bad again and again must not fill the disk

log = logging.getLogger(__name__)


class DeviceFlag:
    """A bool [] on the device, on its way to the host."""

    def __init__(self, flag: torch.Tensor) -> None:
        self._host = flag.to("cpu", non_blocking=True)  # pinned memory where `flag` is on a GPU
        self._copied: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def has_arrived(self) -> bool:
        """Whether `is_bad` may be asked; waits for nothing."""
        return self._copied is None or self._copied.query()

    def is_bad(self) -> bool:
        """The flag."""
        return bool(self._host)


@dataclass
class _Held:
    step: int
    batches: Sequence[Batch]
    flag: DeviceFlag


class NonFiniteDump:
    """Holds the micro-batches of this rank's last steps, and writes those of a bad step to a folder."""

    def __init__(self, folder: Path, about: Mapping[str, Any], rank: int) -> None:
        """`about`: plain values that go into each file, e.g. the configuration."""
        self.folder = folder
        self.about = dict(about)
        self.rank = rank
        self._held: list[_Held] = []
        self._num_saved = 0

    def hold(self, step: int, batches: Sequence[Batch], skipped: torch.Tensor) -> None:
        """Keep a step's micro-batches (on the CPU) until `skipped` (bool [] on the device) is known to be false."""
        known: list[_Held] = []
        unknown: list[_Held] = []
        for one in self._held:  # each is asked once: it may arrive between two questions
            (known if one.flag.has_arrived() else unknown).append(one)
        bad = [one for one in known if one.flag.is_bad()][:_MAX_HELD]
        self._held = [*bad, *unknown, _Held(step, batches, DeviceFlag(skipped))]

    def save(self, step: int, which: Sequence[int], values: Mapping[str, Any]) -> Path | None:
        """Write the micro-batches number `which` of a held step, and `values` about it; return the .pt file.

        None where nothing was written: not held any more, enough files there, or the disk refused, which is logged.
        """
        held = next((one for one in self._held if one.step == step), None)
        if held is None or not which or self._num_saved >= _MAX_SAVED:
            return None
        batches = [held.batches[number] for number in which]
        path = self.folder / f"step_{step:08d}_rank_{self.rank}.pt"
        about = {"step": step, "rank": self.rank, "micro_batches": list(which), **values, **self.about}
        keys = [list(batch.keys) for batch in batches]
        tensors = {
            name: [getattr(batch, name).contiguous() for batch in batches] for name in ("image", "label", "content")
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save({**about, "keys": keys, **tensors}, path)
            text = json.dumps(_as_json({**about, "keys": keys, "tensors": path.name}), indent=1)
            path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
            log.warning("could not save the samples of step %d to %s: %s", step, path, first_line(error))
            return None
        self._num_saved += 1
        return path

    def forget(self) -> None:
        """Release all steps: their flags have been read."""
        self._held.clear()


class NonFiniteStep(NamedTuple):
    """A skipped step. row: its losses, gradient norm and loss scale. micro_losses, keys: this rank's micro-batches'."""

    row: dict[str, Any]
    micro_losses: list[float]
    keys: list[list[str]]

    @property
    def is_large_scale(self) -> bool:
        """Whether only fp16's scale was too large: a finite loss, an infinite gradient. It shrinks by itself."""
        return self.row["loss_scale"] > 1 and all(map(math.isfinite, self.row["losses"].values()))


class NonFiniteMonitor:
    """Counts bad steps, names their samples on all ranks, has them saved, and ends the run after too many in a row.

    Args:
        limit: bad steps in a row that end the run.
        dump: saves the samples of bad steps; None: they are only named.
    """

    def __init__(self, limit: int = 1, dump: NonFiniteDump | None = None) -> None:
        self.limit = limit
        self.dump = dump
        self.num_nonfinite = 0
        self.in_a_row = 0

    def hold(self, step: int, batches: Sequence[Batch], skipped: torch.Tensor) -> None:
        """Keep a step's micro-batches until it is known to be good (see `NonFiniteDump.hold`)."""
        if self.dump:
            self.dump.hold(step, batches, skipped)

    def forget(self) -> None:
        """Release all steps: they have been checked."""
        if self.dump:
            self.dump.forget()

    def check(self, step: int, skipped: NonFiniteStep | None) -> None:
        """Count step `step`, good (None) or skipped; every rank calls it, as all have the same row.

        Raises:
            TrainingError: in `limit` steps in a row a loss or gradient was not finite.
        """
        if skipped is None:
            self.in_a_row = 0
        elif not skipped.is_large_scale:
            self.num_nonfinite += 1
            self.in_a_row += 1
            self._report(step, skipped)

    def _report(self, step: int, bad: NonFiniteStep) -> None:
        """Log which samples a bad step was made of and save them."""
        guilty = [number for number, loss in enumerate(bad.micro_losses) if not math.isfinite(loss)]
        all_ranks = gather_to_all([key for number in guilty for key in bad.keys[number]])
        # Where all losses were finite, the gradient was not, and any sample may be the cause.
        which = guilty if any(all_ranks) else list(range(len(bad.keys)))
        saved = self.dump.save(step, which, {**bad.row, "micro_losses": bad.micro_losses}) if self.dump else None
        named = [f"{key} (rank {rank})" for rank, own in enumerate(all_ranks) for key in own]
        more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        samples = (
            f"samples {', '.join(named[:_MAX_NAMED])}{more}" if named else "all losses are finite, the gradient is not"
        )
        what = f"step {step}: loss {_text(bad.row['losses'])}, gradient norm {bad.row['grad_norm']:g}: {samples}"
        log.warning("%s; update skipped%s", what, f", saved as {saved}" if saved else "")
        if self.in_a_row >= self.limit:
            folder = f"; look into {self.dump.folder}" if self.dump else ""
            raise TrainingError(
                f"precision.max_nonfinite_steps={self.limit} is reached, the last one {what}{folder}; "
                "start under another name= with a lower optim.lr, with optim.clip_norm or with precision.dtype=fp32 "
                "(the checkpoints of this run are sound)"
            )


def _text(losses: dict[str, float]) -> str:
    values = list(losses.values())
    return f"{values[0]:g}" if len(values) == 1 else ", ".join(f"{name} {value:g}" for name, value in losses.items())


def _as_json(value: Any) -> Any:
    """Plain values with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
