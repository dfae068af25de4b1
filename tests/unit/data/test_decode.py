"""Bytes become the arrays they hold; a label's indices survive every PNG kind; what can't be trusted is refused."""

import contextlib
import io
import itertools
import resource
import struct
import subprocess
import zlib
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from dist_deeplab.data.decode import (
    decode_image,
    decode_label,
    decode_packed,
    decode_values,
    encode_label,
    image_size,
    read_image_file,
)
from dist_deeplab.data.image_file import DecodeError, DecodeOptions, turn, turned_back
from dist_deeplab.errors import UserError

labels = arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def to_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_palette(label: np.ndarray, **options: object) -> bytes:
    """A palette PNG whose colours have nothing to do with the indices."""
    image = Image.fromarray(label)
    image.putpalette([channel for index in range(256) for channel in (255 - index, (7 * index + 90) % 256, 3)])
    return to_bytes(image, **options)  # type: ignore[arg-type]


@pytest.fixture
def photo() -> np.ndarray:
    """A smooth image, uint8 [20, 30, 3] RGB, whose three channels differ."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (30, 20))


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_image_equals_pillows_decoding_in_rgb_order(photo: np.ndarray) -> None:
    data = to_bytes(Image.fromarray(photo), "JPEG", quality=95, subsampling=0)
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.shape == (20, 30, 3)
    reference = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(image.astype(int) - reference.astype(int)).max() <= 2, "two JPEG decoders may round differently"


def test_a_lossless_image_keeps_every_pixel(photo: np.ndarray) -> None:
    assert (decode_image(to_bytes(Image.fromarray(photo))) == photo).all()


def test_a_grey_image_is_repeated_on_three_channels(photo: np.ndarray) -> None:
    image = decode_image(to_bytes(Image.fromarray(photo[:, :, 0])))
    assert (image == photo[:, :, :1]).all()
    assert image.shape == (20, 30, 3)


@pytest.mark.quick("P8")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied_or_not_as_told(orientation: int, form: str, photo: np.ndarray) -> None:
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = to_bytes(Image.fromarray(photo), form, exif=exif, **options)
    stored = decode_image(to_bytes(Image.fromarray(photo), form, **options))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert (decode_image(data) == upright).all()
    assert (decode_image(data, DecodeOptions(upright=False)) == stored).all()
    assert (turned_back(upright, orientation) == stored).all()
    assert image_size(data) == upright.shape[:2]
    assert read_image_file(data).orientation == orientation
    if form in ("JPEG", "PNG"):
        assert (decode_packed(data) == stored).all(), "a shard's pixels are as they are stored"


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_that_does_not_exist_is_none(value: int, photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert (decode_image(to_bytes(Image.fromarray(photo), exif=exif)) == photo).all()


def test_more_pixels_than_the_limit_are_refused_with_the_remedy_before_they_are_decoded() -> None:
    data = to_bytes(Image.new("P", (2000, 1000)))
    for read in (decode_image, partial(decode_values, colours=False), image_size):
        with pytest.raises(DecodeError, match=r"2000 x 1000, 2 megapixels, but at most 1 are read; buy memory"):
            read(data, options=DecodeOptions(max_pixels=10**6, if_too_large="buy memory"))  # type: ignore[operator]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_pillows_own_limit_of_pixels_does_not_apply(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = to_bytes(Image.new("P", (400, 300)), form)
    assert decode_image(data).shape == (300, 400, 3)
    assert decode_values(data, colours=False).shape == (300, 400)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_postscript_never_reaches_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(subprocess, "check_call", started.append)
    monkeypatch.setattr(subprocess, "Popen", started.append)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode_image(eps)
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode_values(eps, colours=True)
    assert started == []


def test_only_the_formats_of_the_options_are_read(photo: np.ndarray) -> None:
    with pytest.raises(DecodeError, match=r"known format"):
        decode_image(to_bytes(Image.fromarray(photo), "TIFF"), DecodeOptions(formats=("JPEG", "PNG")))


def test_a_cmyk_jpeg_becomes_rgb(photo: np.ndarray) -> None:
    image = decode_image(to_bytes(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(image.astype(int) - photo.astype(int)).mean() < 8


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_what_is_not_an_image_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match=f"{len(data)} bytes"):
        decode_image(data)
    with pytest.raises(DecodeError, match=f"{len(data)} bytes"):
        decode_packed(data)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_jpeg_is_refused_not_filled_with_grey(share: float, photo: np.ndarray) -> None:
    data = to_bytes(Image.fromarray(photo), "JPEG", quality=95)
    for decode in (decode_image, decode_packed):
        with pytest.raises(DecodeError, match=r"damaged|not an image"):
            decode(data[: int(share * len(data))])


def test_a_jpeg_that_claims_a_monstrous_size_is_refused(photo: np.ndarray) -> None:
    data = bytearray(to_bytes(Image.fromarray(photo), "JPEG"))
    frame = data.index(b"\xff\xc0")  # SOF0: length (2), precision (1), height (2), width (2)
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    for decode in (decode_image, decode_packed):
        with pytest.raises(DecodeError):
            decode(bytes(data))


# --- masks ----------------------------------------------------------------------------------------------------------


INDICES = np.random.default_rng(5).integers(0, 4, (9, 14), dtype=np.uint8)


def grey_png(bits: int, values: np.ndarray) -> bytes:
    """A greyscale PNG of few bits per pixel, which Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(len(values), -1)
    raw = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=1))
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("palette", with_palette(INDICES)),
        ("palette GIF", with_palette(INDICES, kind="GIF")),
        ("palette BMP", with_palette(INDICES, kind="BMP")),
        ("palette TIFF", with_palette(INDICES, kind="TIFF")),
        ("2 bits", grey_png(2, INDICES)),
        ("4 bits", grey_png(4, INDICES)),
        ("16 bits", to_bytes(Image.fromarray(INDICES.astype(np.uint16)))),
        ("16-bit TIFF", to_bytes(Image.fromarray(INDICES.astype(np.uint16)), "TIFF")),
        ("32-bit TIFF", to_bytes(Image.fromarray(INDICES.astype(np.int32)), "TIFF")),
        ("floats", to_bytes(Image.fromarray(INDICES.astype(np.float32)), "TIFF")),
        ("grey RGB", to_bytes(Image.fromarray(np.repeat(INDICES[..., None], 3, axis=2)))),
        ("opaque grey", to_bytes(Image.fromarray(INDICES).convert("LA"))),
        ("opaque RGBA", to_bytes(Image.fromarray(np.repeat(INDICES[..., None], 3, axis=2)).convert("RGBA"))),
        ("PGM of few levels", b"P5 # from a tool\n14 9 20\n" + INDICES.tobytes()),
        ("PGM of 16 bits", b"P5 14 9 300\n" + INDICES.astype(">u2").tobytes()),
        ("lossless WebP", to_bytes(Image.fromarray(INDICES), "WEBP", lossless=True)),
    ],
)
def test_a_mask_of_any_lossless_kind_gives_its_integers(kind: str, data: bytes) -> None:
    assert (decode_values(data, colours=False) == INDICES).all(), kind


def test_a_bilevel_mask_gives_0_and_1() -> None:
    bits = INDICES > 1
    values = decode_values(to_bytes(Image.fromarray(bits)), colours=False)
    assert values.dtype == bool
    assert (values == bits).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (to_bytes(Image.new("RGB", (3, 3), (1, 2, 3))), "in colour"),
        (to_bytes(Image.new("LA", (3, 3), (1, 7))), "in colour"),
        (to_bytes(Image.new("F", (3, 3), 0.5), "TIFF"), "fractions"),
        (to_bytes(Image.new("L", (3, 3)), "JPEG"), "JPEG, which does not keep"),
        (to_bytes(Image.new("L", (3, 3)), "WEBP"), "WEBP, which does not keep"),
    ],
)
def test_a_mask_that_holds_no_integers_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode_values(data, colours=False)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_masks_own_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = to_bytes(Image.fromarray(INDICES), exif=exif)
    assert (decode_values(data, colours=False) == turn(INDICES, orientation)).all()


# --- labels -----------------------------------------------------------------------------------------------------------


@given(label=labels)
def test_encoding_and_decoding_gives_the_same_indices(label: np.ndarray) -> None:
    decoded = decode_label(encode_label(label))
    assert decoded.dtype == np.uint8
    assert decoded.shape == label.shape
    assert (decoded == label).all()


@given(label=labels)
def test_an_encoded_label_is_an_8_bit_single_channel_png_to_any_reader(label: np.ndarray) -> None:
    data = encode_label(label)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "L")
    assert (np.array(image) == label).all()
    assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) == label).all()


@pytest.mark.quick("P8")
@given(label=labels)
def test_a_palette_png_gives_indices_and_never_colours(label: np.ndarray) -> None:
    assert (decode_label(with_palette(label)) == label).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_png_of_few_bits_gives_indices(bits: int) -> None:
    label = np.random.default_rng(bits).integers(0, 2**bits, (7, 13), dtype=np.uint8)
    data = with_palette(label, bits=bits)
    assert data[24] == bits, "the PNG really has few bits a pixel"
    assert (decode_label(data) == label).all()


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_transparent_index_does_not_change_the_label(mode: str) -> None:
    label = np.random.default_rng(0).integers(0, 5, (7, 13), dtype=np.uint8)
    data = to_bytes(Image.fromarray(label), transparency=0) if mode == "L" else with_palette(label, transparency=0)
    assert b"tRNS" in data
    assert (decode_label(data) == label).all()


@pytest.mark.parametrize(
    ("mode", "named"),
    [("RGB", "in colour"), ("RGBA", "in colour"), ("LA", "in colour"), ("I;16", "16-bit"), ("1", "1-bit")],
)
def test_a_png_whose_values_are_no_indices_is_refused_with_its_kind(mode: str, named: str) -> None:
    image = Image.new(mode, (8, 6))
    with pytest.raises(DecodeError, match=named) as caught:
        decode_label(to_bytes(image))
    assert "8-bit class indices" in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_label_that_is_a_jpeg_is_refused(photo: np.ndarray) -> None:
    with pytest.raises(DecodeError, match="not a PNG"):
        decode_label(to_bytes(Image.fromarray(photo[:, :, 0]), "JPEG"))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_a_label_of_hardly_any_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match="not a PNG"):
        decode_label(data)


LABEL = np.random.default_rng(3).integers(0, 21, (8, 10)).repeat(3, 0).repeat(3, 1).astype(np.uint8)
both_kinds = pytest.mark.parametrize("encode", [encode_label, with_palette], ids=["grey", "palette"])


@both_kinds
def test_a_truncated_label_is_refused_or_complete(encode: Callable[[np.ndarray], bytes]) -> None:
    data = encode(LABEL)
    refused = 0
    for length in range(len(data)):
        try:
            assert (decode_label(data[:length]) == LABEL).all()
        except DecodeError:
            refused += 1
    assert refused > 0.8 * len(data)


@both_kinds
def test_a_flipped_bit_never_changes_a_label_unnoticed(encode: Callable[[np.ndarray], bytes]) -> None:
    """Every PNG chunk has a CRC."""
    data = encode(LABEL)
    changed = []
    for place, bit in itertools.product(range(len(data)), (0, 2, 5)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        with contextlib.suppress(DecodeError):
            if not np.array_equal(decode_label(bytes(damaged)), LABEL):
                changed.append((place, bit))
    assert changed == [], f"byte and bit, of {len(data)} bytes"


@pytest.mark.parametrize("before_it", [b"", b"\0\0\0\0IEND\xaeB`\x82", b"\0\0\0\0tEXt\0\0\0\0"], ids=repr)
@pytest.mark.parametrize("kind", [b"IDAT", b"IEND", b"IHDR"], ids=repr)
def test_a_png_whose_chunk_claims_gigabytes_is_refused_without_taking_them(kind: bytes, before_it: bytes) -> None:
    whole = encode_label(np.zeros((8, 8), np.uint8))
    at = whole.index(b"IDAT")
    claims = whole[: at - 4] + before_it + (0xF1000030).to_bytes(4, "big") + kind + whole[at + 4 :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for decode in (decode_label, decode_packed):
        with pytest.raises(DecodeError):
            decode(claims)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19, "KiB: half a GiB"
