"""Bytes become the arrays they hold; a label's indices survive every PNG kind; what can't be trusted is refused."""

import contextlib
import io
import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dist_deeplab.data.decode import DecodeError, decode_image, decode_label, encode_label
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
    return to_bytes(image, **options)


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_not_applied(orientation: int, photo: np.ndarray) -> None:
    """Labels are drawn on the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(to_bytes(Image.fromarray(photo), "JPEG", exif=exif))
    assert (turned == decode_image(to_bytes(Image.fromarray(photo), "JPEG"))).all()


def test_a_cmyk_jpeg_becomes_rgb(photo: np.ndarray) -> None:
    image = decode_image(to_bytes(Image.fromarray(photo).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(image.astype(int) - photo.astype(int)).mean() < 8


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError, match=f"{len(data)} bytes"):
        decode_image(data)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_jpeg_is_refused_not_filled_with_grey(share: float, photo: np.ndarray) -> None:
    data = to_bytes(Image.fromarray(photo), "JPEG", quality=95)
    with pytest.raises(DecodeError, match="damaged"):
        decode_image(data[: int(share * len(data))])


def test_a_jpeg_that_claims_a_monstrous_size_is_refused(photo: np.ndarray) -> None:
    data = bytearray(to_bytes(Image.fromarray(photo), "JPEG"))
    frame = data.index(b"\xff\xc0")  # SOF0: length (2), precision (1), height (2), width (2)
    data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(DecodeError):
        decode_image(bytes(data))


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
