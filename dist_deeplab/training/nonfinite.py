"""What a step whose loss or gradient was not finite was made of, saved so that somebody can look at it.

The device tells that a step was bad only after the host has gone on. So the micro-batches of a step are held until its
flag has arrived by itself, and longer only if it was bad.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.errors import first_line

_MAX_HELD = 4  # bad steps whose images are held at a time; of more only the keys are told
_MAX_SAVED = 16  # files of a process: a run that goes bad over and over must not fill the disk

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
        """Return whether `is_bad` may be asked; waits for nothing."""
        return self._copied is None or self._copied.query()

    def is_bad(self) -> bool:
        """Return the flag."""
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
        known = [one for one in self._held if one.flag.has_arrived()]
        bad = [one for one in known if one.flag.is_bad()][:_MAX_HELD]
        unknown = [one for one in self._held if not one.flag.has_arrived()]
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
        """Let go of all steps: their verdicts have been read."""
        self._held.clear()


def _as_json(value: Any) -> Any:
    """Return plain values with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
