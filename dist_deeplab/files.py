"""What every room that writes files needs: certainty that they are on disk, and which bytes they are."""

import hashlib
import os
from pathlib import Path


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
