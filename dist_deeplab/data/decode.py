"""Bytes of a sample -> checked arrays. A label is indices all the way: a palette is never turned into colours.

OpenCV is imported where it is used, here and in what training imports: a command starts without it.
"""

import io

import numpy as np
from PIL import Image

from dist_deeplab.errors import UserError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH, _COLOR_TYPE = 24, 25  # byte offsets in a PNG's IHDR (PNG specification, section 11.2.2)
_GREY, _PALETTE = 0, 3


class DecodeError(UserError):
    """The bytes of an image or label are damaged or of a kind that can't be trained on."""


def decode_image(data: bytes) -> np.ndarray:
    """The image as uint8 [H, W, 3] RGB; greyscale is repeated on the three channels.

    An EXIF orientation is not applied: labels are drawn on the stored pixels.

    Raises:
        DecodeError: not a decodable image.
    """
    import cv2

    image = _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise DecodeError(f"the image ({len(data)} bytes) can't be decoded; it is damaged or not an image")
    return image


def decode_label(data: bytes) -> np.ndarray:
    """The label as uint8 [H, W] class indices, from an 8-bit greyscale or a palette PNG.

    Raises:
        DecodeError: not a PNG, damaged, or an RGB(A) or 16-bit image, whose values are no class indices.
    """
    import cv2

    if not data.startswith(_PNG_SIGNATURE) or len(data) <= _COLOR_TYPE:
        raise DecodeError(f"the label ({len(data)} bytes) is not a PNG; JPEG and others do not keep class indices")
    depth, color_type = data[_BIT_DEPTH], data[_COLOR_TYPE]
    if (color_type, depth) == (_GREY, 8):
        label = _decode(data, cv2.IMREAD_UNCHANGED)  # 3x Pillow's speed
        if label is None:
            raise DecodeError("the label PNG is damaged")
        return label
    if color_type != _PALETTE:
        kind = f"{depth}-bit greyscale" if color_type == _GREY else "in colour (RGB or with alpha)"
        raise DecodeError(f"the label is {kind}; make it 8-bit class indices (greyscale or palette PNG) first")
    try:
        with Image.open(io.BytesIO(data)) as png:
            png.verify()  # the checksums of all chunks, which decoding alone does not look at
        with Image.open(io.BytesIO(data)) as png:
            return np.array(png, dtype=np.uint8)  # mode P: the indices, at any bit depth
    except Exception:  # decoders of damaged files raise nearly anything, e.g. DecompressionBombError
        raise DecodeError("the label PNG is damaged") from None


def _decode(data: bytes, flags: int) -> "np.ndarray | None":
    import cv2

    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # e.g. a header that claims more pixels than OpenCV takes
        return None


def encode_label(label: np.ndarray) -> bytes:
    """Label indices, uint8 [H, W], as an 8-bit single-channel PNG.

    Without filters: masks are flat areas, so the files are smaller and decode in three quarters of the time.
    """
    import cv2

    options = [cv2.IMWRITE_PNG_COMPRESSION, 9, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return cv2.imencode(".png", label, options)[1].tobytes()
