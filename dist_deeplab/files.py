"""What every package that writes files needs: certainty that they are on disk, which bytes they are, and that a place
can be written to, checked before the work: not hours later."""

import hashlib
import os
from pathlib import Path

from dist_deeplab.errors import UserError


def fsync(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    return digest(path, "sha256")


def digest(path: Path, kind: str) -> str:
    """Return a digest of a file's bytes, as hexadecimal digits; `kind` is one of hashlib's names."""
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
