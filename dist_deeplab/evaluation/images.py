"""People's images: finding them, and reading whatever kind they are as 8-bit RGB."""

import contextlib
import glob
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dist_deeplab.errors import UserError, first_line

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
"""What counts as an image inside a folder; a file that is named itself may have any."""

_ORIENTATION_TAG = 0x0112  # EXIF 2.3; 5 to 8 swap height and width
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class ImageError(UserError):
    """A file is not an image, damaged, or of a kind that has no obvious 8-bit RGB."""


@dataclass(frozen=True)
class Source:
    """An image to predict: its file, and the name of its results, a relative path without suffix."""

    path: Path
    name: str


def find_images(inputs: Sequence[str], *, outside: Path) -> list[Source]:
    """The images that files, folders (searched to any depth) and glob patterns name, sorted by name.

    A folder's images keep their place below it in their names. What lies in the folder `outside`, that of the
    results, is left out.

    Raises:
        UserError: an input that names nothing; two images whose results would have one name.
    """
    found: dict[str, Path] = {}
    for text in inputs:
        paths, root = _expand(text)
        paths = [path for path in paths if not path.resolve().is_relative_to(outside.resolve())]
        if not paths:
            raise UserError(f"{text} names no image; give image files, folders of them or a quoted pattern")
        for path in paths:
            name = (path.relative_to(root) if root else Path(path.name)).with_suffix("").as_posix()
            other = found.setdefault(name, path)
            if other.resolve() != path.resolve():
                raise UserError(f"{other} and {path} would both become {name}.png; predict them into two folders")
    return [Source(path, name) for name, path in sorted(found.items())]


def _expand(text: str) -> tuple[list[Path], Path | None]:
    """The files that an argument names, and the folder that their names are relative to, if there is one."""
    path = Path(text).expanduser()
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS and file.is_file()], path
    if path.exists() or not glob.has_magic(text):
        return ([path] if path.is_file() else []), None
    return [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()], None


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image, from the file's first bytes.

    Raises:
        ImageError: no image.
    """
    with _reading(str(path)), Image.open(path) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION_TAG, 1) >= 5 else (height, width)


def read_image(path: Path) -> np.ndarray:
    """An image as uint8 [H, W, 3] RGB, upright: an EXIF orientation is applied.

    Greyscale is repeated on the channels, 16 bits become their upper 8, transparent parts lie on white, CMYK and
    palettes become RGB, of an animation the first frame is taken.

    Raises:
        ImageError: unreadable, damaged, or of floating-point values.
    """
    return _upright_rgb(path, name=str(path))


def decode_image_bytes(data: bytes) -> np.ndarray:
    """The image in a file's bytes as `read_image` does.

    Raises:
        ImageError: as there.
    """
    return _upright_rgb(io.BytesIO(data), name=f"the image ({len(data)} bytes)")


def _upright_rgb(where: Path | io.BytesIO, *, name: str) -> np.ndarray:
    with _reading(name), Image.open(where) as file:
        image: Image.Image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ImageError(f"{name} holds floating-point values; save it with 8 or 16 bits")
        if image.mode in _SIXTEEN_BIT:
            values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
            return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            upper = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper)
        return np.array(image.convert("RGB"))


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what Pillow may raise into one sentence about the image of this name."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a known kind") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise ImageError(f"{name} can't be read ({first_line(error)})") from None
