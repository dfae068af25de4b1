"""Image files opened within limits: an allow-list of formats, a limit of pixels, one sentence where they fail."""

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dist_deeplab.errors import UserError, first_line

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of all formats that are read; a file's content decides, whatever its name."""
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
"""Those that do not keep class indices; a WebP does where it is lossless."""
MAX_PIXELS = 500_000_000
"""Measured while decoding, beside the file: 14 bytes per pixel of an RGB image that is turned, 22 with transparency, 3
of a mask; so 7, 11 and 1.5 GB at most."""

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4; 5 to 8 swap height and width
_INVERSE = {6: 8, 8: 6}  # the other orientations undo themselves


class _NoLimitOfPillow:
    """Lifts Pillow's limit of pixels, which is global and names no remedy, while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                Image.MAX_IMAGE_PIXELS = self._limit


_no_limit = _NoLimitOfPillow()


class DecodeError(UserError):
    """The bytes of an image or label are damaged, too large, or of a kind that can't be used."""


@dataclass(frozen=True)
class DecodeOptions:
    """What may be read, and how: formats, most pixels and the remedy, whether an EXIF orientation is applied."""

    formats: tuple[str, ...] = FORMATS
    max_pixels: int = MAX_PIXELS
    upright: bool = True
    if_too_large: str = "--max-megapixels raises the limit where there is memory"


DEFAULT = DecodeOptions()


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [H, W, ...] as people see them, by an EXIF orientation of 1 to 8; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows, columns = (slice(None, None, -1 if orientation in flipped else 1) for flipped in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return pixels[rows, columns]


def turned_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels as they are stored: the inverse of `turn`."""
    return turn(pixels, _INVERSE.get(orientation, orientation))


@functools.cache
def endings() -> frozenset[str]:
    """The endings of file names, in lower case and with their dot, of all formats that are read."""
    Image.init()
    return frozenset(ending for ending, form in Image.registered_extensions().items() if form in FORMATS)


@contextlib.contextmanager
def opened(file: bytes | Path, options: DecodeOptions, *, load: bool = True) -> Iterator[tuple[Image.Image, int]]:
    """Open (and decode) a file, or one's bytes, within `options`; yields it with its EXIF orientation."""
    with reading(len(file) if isinstance(file, bytes) else file.stat().st_size):
        Image.init()
        known = tuple(form for form in options.formats if form in Image.OPEN)
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=known) as image:
            num_pixels = image.size[0] * image.size[1]
            if num_pixels > options.max_pixels:
                raise DecodeError(
                    f"the image is {image.size[0]} x {image.size[1]}, {num_pixels / 1e6:,.0f} megapixels, but at most "
                    f"{options.max_pixels / 1e6:,.0f} are read; {options.if_too_large}"
                )
            orientation = _orientation(image)
            if load:
                image.load()
            yield image, orientation


@contextlib.contextmanager
def reading(num_bytes: int) -> Iterator[None]:
    """Turn what Pillow may raise into one sentence; its own limit of pixels does not hold meanwhile."""
    try:
        with _no_limit:
            yield
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(f"the image ({num_bytes:,} bytes) is not an image of a known format") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise DecodeError(f"the image ({num_bytes:,} bytes) is damaged ({first_line(error)})") from None


def _orientation(file: Image.Image) -> int:
    value: Any = file.getexif().get(_ORIENTATION_TAG, 1)
    return value if value in range(1, 9) else 1
