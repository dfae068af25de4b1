"""What every package that writes files needs: whole files or none, digests, and places checked before the work.

There are two kinds of writes. What a run cannot do without is written by `replace_file` and its errors are raised; what
it can do without (a log of times, a status for scripts) is written inside `NonEssentialWrites`, which warns once.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dist_deeplab.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, fill: Callable[[Path], T], *, durable: bool = True) -> T:
    """Write a file whole or not at all: `fill` a temporary one beside it, sync it to disk, rename it to `path`.

    The temporary name is this call's own, so that two processes that write the same file do not mix their bytes.
    `durable=False` leaves out the syncs (some 10 ms a file): for files that are made again if the power fails.

    Returns:
        What `fill` returned.

    Raises:
        OSError: e.g. a full disk; what was there before is untouched and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        result = fill(temporary)
        if durable:
            fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)
    return result


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all (see `replace_file`)."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class NonEssentialWrites:
    """Writes that a run can do without: the first that fails is a warning, and no error.

    Args:
        what: names the file or its purpose in the warning.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.failing = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Turn an `OSError` in this context into a warning, one for each time that writing starts to fail."""
        try:
            yield
            self.failing = False
        except OSError as error:
            if not self.failing:
                log.warning("%s is not written (%s); the run continues without it", self.what, error)
            self.failing = True


def sidecar_digests(path: Path) -> list[str]:
    """SHA-256 digests that a file with a sidecar (`<stem>.json`) may have, the newest first; none if unreadable.

    There are several while a checkpoint is being replaced: file and sidecar cannot be renamed at one moment.
    """
    try:
        values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return [values["sha256"], *values.get("replaces", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    return digest(path, "sha256")


def digest(path: Path, kind: str) -> str:
    """A digest of a file's bytes, as hexadecimal digits; `kind` is one of hashlib's names."""
    found = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def prepare_folder(folder: Path, *, remedy: str) -> None:
    """Make a folder that will be written to; `remedy` ends the error's sentence, e.g. choose another --out.

    Raises:
        UserError: it can't be made, is a file, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "it may not be written to"
    except FileExistsError:
        problem = "it is a file"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise UserError(f"cannot write to the folder {folder}: {problem}; {remedy}")


def prepare_file(file: Path, *, remedy: str) -> None:
    """Make the folder of a file that will be written; the file itself is not touched.

    Raises:
        UserError: it is a folder, or its folder can't be made or written to.
    """
    if file.is_dir():
        raise UserError(f"cannot write the file {file}: it is a folder; {remedy}")
    prepare_folder(file.parent, remedy=remedy)
