"""Checkpoint files: written whole or not at all, verified by digest, loaded without running code.

A checkpoint is a pair `step_00001000.pt` and `step_00001000.json`; the sidecar holds the SHA-256 of the first (torch
notices a truncated file but not a flipped byte). It is written before the file gets its name: a process that is killed
then leaves a sidecar without a file, which is harmless, and not the reverse, which looks like a damaged checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_deeplab.command_line import command_name
from dist_deeplab.errors import UserError, first_line
from dist_deeplab.files import fsync, replace_file, replace_text, sha256, sidecar_digests
from dist_deeplab.model.weights.formats.torch_file import load_opened

FORMAT = "dist_deeplab.checkpoint/1"


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written: another one may be used in its place."""


def load_content(path: Path) -> dict[str, Any]:
    """The content of a verified checkpoint, tensors on the CPU; no code in the file is run.

    The file is opened once: what is read are the bytes that were verified, even if it is replaced meanwhile.

    Raises:
        DamagedCheckpoint: file or sidecar missing, or another SHA-256 than the sidecar's.
        UserError: not a checkpoint of ours.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; give a file, e.g. RUN/checkpoints/best.pt")
    if not path.is_file():
        raise DamagedCheckpoint(f"there is no checkpoint at {path}; those of a run are RUN/checkpoints/*.pt")
    expected = sidecar_digests(path)
    if not expected:
        raise DamagedCheckpoint(
            f"the checkpoint {path} has no readable sidecar {path.with_suffix('.json').name}; if it is not "
            f"a checkpoint of ours, make one of it by {command_name('convert-weights')} IN OUT.pt --to checkpoint"
        )
    with path.open("rb") as file:
        before = _changed_at(file)
        if hashlib.file_digest(file, "sha256").hexdigest() not in expected:
            raise DamagedCheckpoint(f"the checkpoint {path} is damaged: its SHA-256 is not the one in its sidecar")
        try:
            content = load_opened(file, path)
        except UserError:
            raise
        except Exception as error:  # an unpickler that meets arbitrary bytes may raise anything
            raise UserError(f"{path} can't be read as a checkpoint: {first_line(error)}") from None
        if _changed_at(file) != before:
            raise DamagedCheckpoint(f"the checkpoint {path} was written to while it was read")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a {FORMAT!r} file; dist_deeplab.train writes those")
    return content


def _changed_at(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def save_content(
    path: Path, content: dict[str, Any], *, step: int, also: Callable[[Path, str], None] = lambda file, digest: None
) -> None:
    """Write `content` to `path` and its sidecar beside it.

    What was at `path` before stays sound until it is replaced: the sidecar names its digest too.

    Args:
        path: of the file, `.pt`.
        content: tensors and plain values.
        step: number of steps done, for the sidecar.
        also: called with the file, whole and on disk under a temporary name, and its SHA-256, before it can be found.

    Raises:
        OSError: e.g. a full disk, or a disk that gives back other bytes; what was there before is untouched.
    """

    def fill(temporary: Path) -> None:
        digest = _write_tensors(temporary, {"format": FORMAT, **content}, name=path)
        fsync(temporary)  # before anything else names it
        also(temporary, digest)
        write_sidecar(path, temporary, step=step, digest=digest)

    replace_file(path, fill)


def _write_tensors(temporary: Path, content: dict[str, Any], *, name: Path) -> str:
    """Write a file, read it back, and return the SHA-256 of what was meant to be there; errors call it `name`."""
    with temporary.open("wb", buffering=0) as file:
        hashed = _HashedFile(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]  # write and flush are all it uses
        except RuntimeError as error:  # what torch makes of a failing write
            raise hashed.error or OSError(f"cannot write {name}: {first_line(error)}") from error
    if sha256(temporary) != hashed.digest.hexdigest():
        raise OSError(f"cannot write {name}: what was read back is not what was written")
    return hashed.digest.hexdigest()


def write_sidecar(path: Path, file: Path, *, step: int, digest: str) -> None:
    """Write the sidecar of `path` for a `file` that is to replace it; what is there until then still verifies."""
    replaced = sidecar_digests(path)[:2]
    values = {"format": FORMAT, "step": step, "sha256": digest, "size_bytes": file.stat().st_size}
    replace_text(path.with_suffix(".json"), json.dumps(values | ({"replaces": replaced} if replaced else {})) + "\n")


class _HashedFile:
    """A file for torch.save that digests what passes, and keeps the error that torch would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        done = 0
        try:
            while done < len(view):  # an unbuffered file may take less than it is given
                done += self.file.write(view[done:])
        except OSError as error:
            self.error = error
            raise
        return done

    def flush(self) -> None:
        """Nothing is buffered."""
