"""Bytes of a file -> checked arrays. One decoder for images and one for masks, whoever reads them.

Packing, prediction, serving and export call `decode_image` and `decode_values`: every format of an allow-list (so no
other program, e.g. Ghostscript, is ever started), upright by its EXIF orientation, transparency on white, 16 bits and
palettes as 8-bit RGB, and never more pixels than a limit. Packing stores what was decoded so that every reader of the
shards sees the same pixels (`Decoded.plain`); training and evaluation therefore read a shard's members by the faster
`decode_packed` and `decode_label`. A label is indices all the way: a palette is never turned into colours.

OpenCV is imported where it is used, here and in what training imports: a command starts without it.
"""

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dist_deeplab.data.image_file import (
    DEFAULT,
    LOSSY,
    DecodeError,
    DecodeOptions,
    opened,
    reading,
    turn,
    turned_back,
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH, _COLOR_TYPE = 24, 25  # byte offsets in a PNG's IHDR (PNG specification, section 11.2.2)
_GREY, _PALETTE = 0, 3
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class Decoded(NamedTuple):
    """An image: uint8 [H, W, 3] RGB; its format; the EXIF orientation it carries (1: none).

    plain: a decoder that knows nothing of orientation, transparency and 16 bits sees the same pixels.
    """

    pixels: np.ndarray
    format: str
    orientation: int
    plain: bool


def decode_image(data: bytes, options: DecodeOptions = DEFAULT) -> np.ndarray:
    """An image file's pixels, uint8 [H, W, 3] RGB, as people see them.

    Greyscale is repeated on the channels, 16 bits become their upper 8, transparent parts lie on white, CMYK and
    palettes become RGB, of an animation the first frame is taken.

    Raises:
        DecodeError: damaged, of another format, too large, or of floating-point values.
    """
    return read_image_file(data, options).pixels


def read_image_file(data: bytes, options: DecodeOptions = DEFAULT) -> Decoded:
    """An image with what packing needs to know about its file; see `decode_image`."""
    with opened(data, options) as (file, orientation):
        plain = file.mode in ("1", "L", "RGB", "P") and "transparency" not in file.info and orientation == 1
        plain = plain and not (file.format == "PNG" and data[_BIT_DEPTH] == 16)
        return Decoded(_turn_back(_to_rgb(file), file, orientation, options), str(file.format), orientation, plain)


def image_size(file: bytes | Path, options: DecodeOptions = DEFAULT) -> tuple[int, int]:
    """Height and width of the upright image, from the header of a file or of one's bytes.

    Raises:
        DecodeError: see `decode_image`.
    """
    with opened(file, options, load=False) as (image, orientation):
        width, height = image.size
        swapped = orientation >= 5 and image.format != "TIFF"  # of a TIFF Pillow gives the upright size
        return (width, height) if swapped else (height, width)


def decode_values(data: bytes, *, colours: bool, options: DecodeOptions = DEFAULT) -> np.ndarray:
    """What a mask file holds per pixel: [H, W] of the stored integers, or with `colours` uint8 [H, W, 3] RGB.

    Integers are palette indices, grey levels of 1 (bool), 2, 4, 8, 16 or 32 bits as they are stored, floating-point
    values without fractions, or colours that are all grey.

    Raises:
        DecodeError: damaged, lossy, too large, or, without `colours`, in colour.
    """
    if data.startswith(_PNG_SIGNATURE):
        with reading(len(data)), Image.open(io.BytesIO(data), formats=("PNG",)) as png:
            png.verify()  # the checksums of all chunks, which decoding alone does not look at
    with opened(data, options) as (file, orientation):
        if file.format in LOSSY or (file.format == "WEBP" and b"VP8L" not in data[:64]):
            raise DecodeError(f"the mask is a {file.format}, which does not keep class indices; export it as PNG")
        pixels = np.asarray(file.convert("RGB")) if colours else _stored_integers(file, data)
        return np.require(_turn_back(pixels, file, orientation, options), requirements=["C", "W"])


def decode_packed(data: bytes) -> np.ndarray:
    """The image of a shard, uint8 [H, W, 3] RGB: its stored pixels, by the fastest decoder.

    An orientation is not applied and transparency not drawn, as other readers of WebDataset do not either; packing
    leaves neither in a shard.

    Raises:
        DecodeError: not a decodable image.
    """
    import cv2

    image = _opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise DecodeError(f"the image ({len(data):,} bytes) can't be decoded; it is damaged or not an image")
    return image


def decode_label(data: bytes) -> np.ndarray:
    """The label of a shard, uint8 [H, W] class indices, from an 8-bit greyscale or a palette PNG.

    Raises:
        DecodeError: not a PNG, damaged, or an RGB(A) or 16-bit image, whose values are not class indices.
    """
    import cv2

    if not data.startswith(_PNG_SIGNATURE) or len(data) <= _COLOR_TYPE:
        raise DecodeError(f"the label ({len(data):,} bytes) is not a PNG; JPEG and others do not keep class indices")
    depth, color_type = data[_BIT_DEPTH], data[_COLOR_TYPE]
    if (color_type, depth) == (_GREY, 8):
        label = _opencv(data, cv2.IMREAD_UNCHANGED)  # 3x Pillow's speed
        if label is None:
            raise DecodeError("the label PNG is damaged")
        return label
    if color_type != _PALETTE:
        kind = f"{depth}-bit greyscale" if color_type == _GREY else "in colour (RGB or with alpha)"
        raise DecodeError(f"the label is {kind}; make it 8-bit class indices (greyscale or palette PNG) first")
    return decode_values(data, colours=False, options=DecodeOptions(upright=False)).astype(np.uint8)


def encode_label(label: np.ndarray) -> bytes:
    """Label indices, uint8 [H, W], as an 8-bit single-channel PNG.

    Without filters: masks are flat areas, so the files are smaller and decode in three quarters of the time.
    """
    import cv2

    options = [cv2.IMWRITE_PNG_COMPRESSION, 9, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return cv2.imencode(".png", label, options)[1].tobytes()


def _opencv(data: bytes, flags: int) -> "np.ndarray | None":
    import cv2

    if data.startswith(_PNG_SIGNATURE):
        data = _up_to_its_end(data)
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # e.g. a header that claims more pixels than OpenCV takes
        return None


def _up_to_its_end(data: bytes) -> bytes:
    """A PNG without what follows its end chunk; empty where a chunk claims more bytes than there are.

    OpenCV 5 allocates what a chunk claims, up to 4 GiB, and then fails; it also takes for chunks what comes after the
    end chunk. A chunk is its length (4 bytes), kind, content and checksum (PNG, third edition, section 5.3).
    """
    at, kind = len(_PNG_SIGNATURE), b""
    while at + 8 <= len(data) and kind != b"IEND":
        kind = data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return data[:at] if at <= len(data) else b""


def _turn_back(pixels: np.ndarray, file: Image.Image, orientation: int, options: DecodeOptions) -> np.ndarray:
    """Pixels as `options` want them: of a TIFF Pillow has applied the orientation already."""
    is_upright = file.format == "TIFF"
    if options.upright == is_upright or orientation == 1:
        return pixels
    return turn(pixels, orientation) if options.upright else turned_back(pixels, orientation)


def _to_rgb(file: Image.Image) -> np.ndarray:
    if file.mode == "F":
        raise DecodeError("the image holds floating-point values; save it with 8 or 16 bits")
    if file.mode in _SIXTEEN_BIT:
        values = np.clip(np.asarray(file), 0, 65535).astype(np.uint16)
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if file.mode in _ALPHA or "transparency" in file.info:
        upper = file.convert("RGBA")
        file = Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper)
    return np.array(file.convert("RGB"))


def _stored_integers(file: Image.Image, data: bytes) -> np.ndarray:
    """Integers as they are in the file; see `decode_values`."""
    values = np.asarray(file)
    if file.mode in ("P", "1"):
        return values
    if file.mode == "F":
        if not np.isfinite(values).all() or (values != np.rint(values)).any():
            raise DecodeError("the mask holds fractions, which are not labels; save it with integers")
        return values.astype(np.int64)
    if file.format == "PNG" and file.mode == "L" and data[_BIT_DEPTH] < 8:
        return values // (255 // (2 ** data[_BIT_DEPTH] - 1))  # Pillow spreads 2 and 4 bits over 0..255
    if file.mode == "L" or file.mode in _SIXTEEN_BIT:
        return _unscaled_pgm(values, data) if file.format == "PPM" else values
    channels = values.reshape(*values.shape[:2], -1)
    opaque = file.mode not in _ALPHA or bool((channels[..., -1] == 255).all())
    grey = channels[..., : 1 if file.mode == "LA" else 3]
    deep = file.format == "PNG" and data[_BIT_DEPTH] == 16  # Pillow drops the lower 8 bits of colours
    if not opaque or deep or (grey != grey[..., :1]).any():
        raise DecodeError("the mask is in colour, not class indices; name its colours in a --label-map")
    return grey[..., 0]


def _unscaled_pgm(values: np.ndarray, data: bytes) -> np.ndarray:
    """The integers of a PGM file: Pillow spreads 0..maxval over 0..255 or 0..65535."""
    maxval = int(re.sub(rb"#[^\n]*\n", b" ", data[:4096]).split()[3])
    full = 255 if maxval <= 255 else 65535
    return values if maxval == full else np.rint(values * (maxval / full)).astype(values.dtype)
