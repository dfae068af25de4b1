"""Checkpoints: written whole or not at all, verified by digest, found by looking at what is there.

A checkpoint is a pair `step_00001000.pt` and `step_00001000.json`; the sidecar holds the SHA-256 of the first (torch
notices a truncated file but not a flipped byte) and is written last. `best.pt` is such a pair too.
"""

import collections
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_deeplab.errors import UserError, first_line
from dist_deeplab.files import fsync, sha256
from dist_deeplab.runtime.distributed import broadcast_from_main

FORMAT = "dist_deeplab.checkpoint/1"
BEST = "best"
_STEP_NAME = re.compile(r"step_(\d{8})")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of a run. All ranks make the same calls; only the one with `is_writer` writes."""

    path: Path
    keep_last: int
    is_writer: bool

    def save(self, content: dict[str, Any], *, step: int, is_best: bool) -> None:
        """Write `content` (tensors and plain values) as the checkpoint of `step`, then drop old ones.

        Raises:
            OSError: e.g. a full disk; what was there before is untouched.
            ValueError: the model holds NaN or infinity, or `content` something that a safe load would refuse; nothing
                was written.
        """
        if not self.is_writer:
            return
        _require_plain(content)
        _require_finite(content)
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step_{step:08d}.pt"
        digest = _write(path, lambda temporary: torch.save({"format": FORMAT, **content}, temporary))
        if is_best:
            self._link_best(path, step=step, digest=digest)
        _write_sidecar(path, step=step, digests=[digest])  # last: only now can the step be found, best included
        self._set_later_aside(step)
        self._prune()

    def newest(self) -> Path | None:
        """Return the newest checkpoint that verifies, or None; damaged ones are reported and passed over.

        The writer looks and tells the others: every rank must call it.
        """
        return broadcast_from_main(self._newest_here() if self.is_writer else None)

    def _newest_here(self) -> Path | None:
        for path in reversed(self._all()):
            try:
                verify(path)
                return path
            except UserError as error:
                log.warning("%s; trying the one before", error)
        return None

    def has_any(self) -> bool:
        """Return whether there is any checkpoint, damaged or not."""
        return bool(self._all())

    def _all(self) -> list[Path]:
        return sorted(path for path in self.path.glob("step_*.pt") if _STEP_NAME.fullmatch(path.stem))

    def _link_best(self, path: Path, *, step: int, digest: str) -> None:
        """Make `best.pt` a second name of the file just written: no copy of hundreds of megabytes."""
        best = self.path / f"{BEST}.pt"
        temporary = self.path / f".{BEST}.pt.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        # The sidecar goes first and names old and new file: killed between the two renames, best.pt still verifies.
        _write_sidecar(best, step=step, digests=[digest, *_sidecar_digests(best)[:2]], size_bytes=path.stat().st_size)
        os.replace(temporary, best)
        fsync(self.path)

    def _set_later_aside(self, step: int) -> None:
        """Rename checkpoints of later steps: they were passed over, and must neither be found nor count as kept."""
        for path in self._all():
            if path.stem > f"step_{step:08d}":
                log.warning("%s was passed over when the run went on from before it; renamed to *.passed_over", path)
                for file in (path, path.with_suffix(".json")):
                    if file.exists():
                        os.replace(file, file.with_name(f"{file.name}.passed_over"))

    def _prune(self) -> None:
        for path in self._all()[: -self.keep_last]:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink(missing_ok=True)


def verify(path: Path) -> None:
    """Compare a checkpoint's SHA-256 with the one in its sidecar.

    Raises:
        UserError: file or sidecar missing, or digest wrong.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    expected = _sidecar_digests(path)
    if not expected:
        raise UserError(f"the checkpoint {path} has no readable sidecar {path.with_suffix('.json').name}")
    if sha256(path) not in expected:
        raise UserError(f"the checkpoint {path} is damaged: its SHA-256 is not the one in its sidecar")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a verified checkpoint, tensors on the CPU; no code in the file is run.

    Raises:
        UserError: missing, damaged, or not a checkpoint of ours.
    """
    verify(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that meets arbitrary bytes may raise anything
        raise UserError(f"{path} can't be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a {FORMAT!r} file; dist_deeplab.train writes those")
    return content


def _require_plain(value: Any, where: str = "checkpoint") -> None:
    """Raise ValueError for anything but tensors and exact plain types: `weights_only=True` would not load it again."""
    if type(value) in (dict, collections.OrderedDict):
        for key, item in value.items():
            _require_plain(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _require_plain(item, f"{where}[{number}]")
    elif type(value) not in (str, int, float, bool, type(None), torch.Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, not a tensor or plain value")


def _require_finite(content: dict[str, Any]) -> None:
    for name, tensor in content["model"].items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity")


def _sidecar_digests(path: Path) -> list[str]:
    """Return the digests that a checkpoint may have, the newest first; none where the sidecar can't be read."""
    try:
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return [values["sha256"], *values.get("replaces", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _write_sidecar(path: Path, *, step: int, digests: list[str], size_bytes: int | None = None) -> None:
    """Write a sidecar that names the file's digest, first, and those of files that it may still be replacing."""
    size = path.stat().st_size if size_bytes is None else size_bytes
    values = {"format": FORMAT, "step": step, "sha256": digests[0], "size_bytes": size}
    text = json.dumps(values | ({"replaces": digests[1:]} if digests[1:] else {}))
    _write(path.with_suffix(".json"), lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def _write(path: Path, fill: Callable[[Path], Any]) -> str:
    """Fill a temporary file, sync it to disk, rename it to `path`, and return its SHA-256."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        fill(temporary)
        digest = sha256(temporary)
        fsync(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch makes of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {first_line(error)}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)
    return digest
