"""Images to predict: finding them, and reading their files with errors that name them."""

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_deeplab.data import decode
from dist_deeplab.data.folders import describe_left_out, list_folder
from dist_deeplab.data.image_file import DEFAULT, DecodeError, DecodeOptions
from dist_deeplab.errors import UserError

log = logging.getLogger(__name__)


class ImageError(UserError):
    """A file is not an image, damaged, too large, or of a kind that has no obvious 8-bit RGB."""


@dataclass(frozen=True)
class Source:
    """An image to predict: its file, and the name of its results, a relative path without suffix."""

    path: Path
    name: str


def find_images(inputs: Sequence[str], *, outside: Path) -> list[Source]:
    """The images that files, folders (searched to any depth) and glob patterns name, sorted by name.

    A folder's images keep their place below it in their names. What lies in the folder `outside`, that of the
    results, is left out; other files of a folder that are not images are counted and named in the log.

    Raises:
        UserError: an input that names nothing; two images whose results would have one name.
    """
    found: dict[str, Path] = {}
    left_out: list[Path] = []
    for text in inputs:
        paths, others, root = _expand(text)
        paths, others = (
            [path for path in files if not path.resolve().is_relative_to(outside.resolve())]
            for files in (paths, others)
        )
        left_out += others
        if not paths:
            raise UserError(f"{text} names no image; give image files, folders of them or a quoted pattern")
        for path in paths:
            name = (path.relative_to(root) if root else Path(path.name)).with_suffix("").as_posix()
            other = found.setdefault(name, path)
            if other.resolve() != path.resolve():
                raise UserError(f"{other} and {path} would both become {name}.png; predict them into two folders")
    if left_out:
        log.warning("%s", describe_left_out(left_out, why="not an image by its name"))
    return [Source(path, name) for name, path in sorted(found.items())]


def _expand(text: str) -> tuple[list[Path], list[Path], Path | None]:
    """The images that an argument names, a folder's other files, and the folder that names are relative to."""
    path = Path(text).expanduser()
    if path.is_dir():
        content = list_folder(path)
        return content.images, content.others, path
    if path.exists() or not glob.has_magic(text):
        return ([path] if path.is_file() else []), [], None
    return [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()], [], None


def image_size(path: Path, options: DecodeOptions = DEFAULT) -> tuple[int, int]:
    """Height and width of the upright image, from the file's header.

    Raises:
        ImageError: not an image.
    """
    try:
        return decode.image_size(path, options)
    except OSError as error:
        raise ImageError(f"{path} can't be read ({error.strerror})") from None
    except DecodeError as error:
        raise ImageError(f"{path}: {error}") from None


def read_image(path: Path, options: DecodeOptions = DEFAULT) -> np.ndarray:
    """An image as uint8 [H, W, 3] RGB, upright, as `decode_image` gives it.

    Raises:
        ImageError: unreadable, damaged, too large, or of floating-point values.
    """
    try:
        return decode.decode_image(_content(path), options)
    except DecodeError as error:
        raise ImageError(f"{path}: {error}") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path} can't be read ({error.strerror})") from None
