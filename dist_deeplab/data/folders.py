"""Which files of a folder are images: all that the decoder reads, and what was left out, so that it can be named."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dist_deeplab.data.image_file import endings

_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")  # of Windows, macOS and Synology, in lower case
_SHOWN = 5


class FolderContent(NamedTuple):
    """Files in a folder and those below it, sorted: images by their endings, and all others."""

    images: list[Path]
    others: list[Path]


def list_folder(folder: Path) -> FolderContent:
    """What a folder holds; hidden and system files apart. Links to folders are followed, but never in a circle."""
    files = sorted(_walk(folder, ()))
    content = FolderContent([], [])
    for file in files:
        (content.images if file.suffix.lower() in endings() and file.is_file() else content.others).append(file)
    return content


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, (*above, identity))
            else:
                yield folder / entry.name


def describe_left_out(files: list[Path], *, why: str) -> str:
    """A sentence that counts and names files that are not used; empty where there are none."""
    if not files:
        return ""
    more = f" and {len(files) - _SHOWN:,} more" if len(files) > _SHOWN else ""
    subject = "1 file is" if len(files) == 1 else f"{len(files):,} files are"
    return f"{subject} left out ({why}): {', '.join(str(file) for file in files[:_SHOWN])}{more}"
