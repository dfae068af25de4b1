"""One sample on its way from files to a shard: decoded, turned upright, paired with its mask, cut into tiles, encoded.

What a shard holds means the same to every reader. A JPEG's or PNG's own bytes are kept where a plain decoder sees the
pixels that we see. All else becomes an RGB PNG, which is lossless: other formats, images with an EXIF orientation
(upright then; a JPEG of the same quality would need a second lossy compression), with transparency, 16 bits or CMYK.
Such a PNG is five to eight times as large as a photograph's JPEG. A JPEG whose orientation is not to be applied keeps
its bytes but for the metadata that says it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from dist_deeplab.data.decode import Decoded, decode_packed, encode_label, read_image_file
from dist_deeplab.data.image_file import DEFAULT, DecodeError, DecodeOptions, turn, turned_back
from dist_deeplab.data.packing.label_map import LabelMap
from dist_deeplab.data.packing.labels import LabelSpace, decode_mask
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.shards.manifest import ShardError
from dist_deeplab.data.windows import Windows


@dataclass(frozen=True)
class Reading:
    """How files become samples: a map of their masks, how files are decoded, the tiles that large images become."""

    label_map: LabelMap | None = None
    options: DecodeOptions = DEFAULT
    tiles: Windows | None = None


AS_THEY_ARE = Reading()


class Packed(NamedTuple):
    """A sample as it goes into a shard: {ending: bytes}, and its pixels of each class, int64 [num_classes]."""

    key: str
    members: dict[str, bytes]
    class_pixels: np.ndarray


class PackedFile(NamedTuple):
    """What one image became: its samples, and what was done to it.

    turned: its EXIF orientation was applied; against_options: the mask fits in the other of the two ways only, so that
    one was taken; reencoded: its own bytes are not in the shard; void_tiles: tiles left out because they are void
    alone.
    """

    samples: list[Packed]
    turned: bool
    against_options: bool
    reencoded: bool
    void_tiles: int


def pack_sample(sample: SourceSample, *, labels: LabelSpace, reading: Reading) -> PackedFile:
    """Decode a sample's files, check them and encode them for a shard.

    Raises:
        ShardError: a file is damaged, of a wrong kind or too large; sizes differ; a label is neither class nor void.
    """
    content = sample.image.read_bytes()
    decoded = _decode(sample, content, reading.options)
    try:
        label = decode_mask(sample.label.read_bytes(), reading.label_map, reading.options)
    except DecodeError as error:
        raise ShardError(f"{sample.label}: {error}") from None
    is_upright = reading.options.upright
    pixels, against_options = decoded.pixels, False
    if label.shape != pixels.shape[:2] and decoded.orientation >= 5 and label.shape == pixels.shape[1::-1]:
        pixels = turned_back(pixels, decoded.orientation) if is_upright else turn(pixels, decoded.orientation)
        is_upright, against_options = not is_upright, True
    if label.shape != pixels.shape[:2]:
        (height, width), (label_height, label_width) = pixels.shape[:2], label.shape
        raise ShardError(
            f"sizes differ: {sample.image} is {width} x {height}, {sample.label} is {label_width} x {label_height}"
        )
    turned = is_upright and decoded.orientation != 1
    if reading.tiles is not None and max(label.shape) > reading.tiles.side:
        samples = list(_tiles(sample, pixels, label, labels, reading.tiles))
        kept = [tile for tile in samples if tile.class_pixels.any()]
        return PackedFile(kept, turned, against_options, True, len(samples) - len(kept))
    image, reencoded = _image_member(content, decoded, pixels, is_upright=is_upright)
    packed = Packed(sample.key, image | {"png": encode_label(label)}, labels.count(label, where=str(sample.label)))
    return PackedFile([packed], turned, against_options, reencoded, 0)


def _decode(sample: SourceSample, content: bytes, options: DecodeOptions) -> Decoded:
    try:
        return read_image_file(content, options)
    except DecodeError as error:
        raise ShardError(f"{sample.image}: {error}") from None


def _tiles(
    sample: SourceSample, pixels: np.ndarray, label: np.ndarray, labels: LabelSpace, tiles: Windows
) -> Iterator[Packed]:
    side = tiles.side
    for top in tiles.starts(label.shape[0]):
        for left in tiles.starts(label.shape[1]):
            shown = np.ascontiguousarray(label[top : top + side, left : left + side])
            counts = labels.count(shown, where=str(sample.label))
            members = {"rgb.png": _png(pixels[top : top + side, left : left + side]), "png": encode_label(shown)}
            yield Packed(f"{sample.key}_y{top:06d}_x{left:06d}", members, counts)


def _image_member(
    content: bytes, decoded: Decoded, pixels: np.ndarray, *, is_upright: bool
) -> tuple[dict[str, bytes], bool]:
    """{ending: bytes} in which every reader sees `pixels`, and whether they are not the file's own bytes."""
    if content.startswith(b"\xff\xd8"):
        ending, own = "jpg", content if is_upright or decoded.orientation == 1 else without_metadata(content)
    else:
        ending, own = "rgb.png", content
    plain = decoded.plain or (ending == "jpg" and own is not content)
    if plain and decoded.format in ("JPEG", "MPO", "PNG") and np.array_equal(decode_packed(own), pixels):
        return {ending: own}, False
    return {"rgb.png": _png(pixels)}, True


def without_metadata(jpeg: bytes) -> bytes:
    """A JPEG without its APP1 segments (EXIF and XMP), which say the orientation; its pixels stay what they are."""
    kept, place = [jpeg[:2]], 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF and jpeg[place + 1] not in (0xDA, 0xD9):
        marker, length = jpeg[place + 1], struct.unpack(">H", jpeg[place + 2 : place + 4])[0]
        if marker != 0xE1:
            kept.append(jpeg[place : place + 2 + length])
        place += 2 + length
    return b"".join([*kept, jpeg[place:]])


def _png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR))[1].tobytes()
