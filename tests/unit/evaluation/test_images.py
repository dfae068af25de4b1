"""Images of every kind become upright 8-bit RGB; what can't is named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dist_deeplab.errors import UserError
from dist_deeplab.evaluation.images import ImageError, Source, find_images, image_size, read_image

_RNG = np.random.default_rng(0)
RGB = cv2.resize(_RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8), (50, 30), interpolation=cv2.INTER_CUBIC)
GREY = RGB[..., 0]


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 1), (8, 3)])
def test_an_exif_orientation_is_applied(tmp_path: Path, orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _save(tmp_path / "image.png", Image.fromarray(np.rot90(RGB, turn).copy()), exif=exif)
    np.testing.assert_array_equal(read_image(path), RGB)
    assert image_size(path) == RGB.shape[:2]


def test_greyscale_16_bits_palettes_and_transparency_become_rgb(tmp_path: Path) -> None:
    grey = np.repeat(GREY[..., None], 3, axis=2)
    wide = Image.fromarray(GREY.astype(np.uint16) * 256 + 200)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "a.png", Image.fromarray(GREY))), grey)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "b.png", wide)), grey)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "c.tiff", wide)), grey)
    cv2.imwrite(str(tmp_path / "d.png"), RGB[..., ::-1].astype(np.uint16) * 256 + 7)
    np.testing.assert_array_equal(read_image(tmp_path / "d.png"), RGB)
    palette = Image.fromarray(GREY // 64)
    palette.putpalette([9, 8, 7, 6, 5, 4, 3, 2, 1, 255, 0, 128])
    colours = np.array([[9, 8, 7], [6, 5, 4], [3, 2, 1], [255, 0, 128]], dtype=np.uint8)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "e.png", palette)), colours[GREY // 64])
    alpha = np.full(GREY.shape, 255, dtype=np.uint8)
    alpha[:10] = 0
    seen = RGB.copy()
    seen[:10] = 255  # on white
    path = _save(tmp_path / "f.png", Image.fromarray(np.dstack([RGB, alpha])))
    np.testing.assert_array_equal(read_image(path), seen)
    cmyk = read_image(_save(tmp_path / "g.jpg", Image.fromarray(RGB).convert("CMYK"), quality=100))
    assert np.abs(cmyk.astype(int) - RGB).mean() < 3


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(50), "truncated", "float"])
def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "bad.jpg"
    if content == "truncated":
        _save(path, Image.fromarray(RGB))
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "float":
        _save(path, Image.fromarray(GREY.astype(np.float32)), format="TIFF")
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    with pytest.raises(ImageError, match=r"bad\.jpg") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.jpg", "sub/b.PNG", "sub/deep/c.jpeg", "notes.txt", "out/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_files_folders_and_patterns_name_images(tree: Path) -> None:
    out = tree / "out"
    everything = [Source(tree / "a.jpg", "a"), Source(tree / "sub/b.PNG", "sub/b")]
    everything.append(Source(tree / "sub/deep/c.jpeg", "sub/deep/c"))
    assert find_images([str(tree)], outside=out) == everything
    assert find_images([str(tree / "**/*.jp*g")], outside=out) == [everything[0], Source(tree / "sub/deep/c.jpeg", "c")]
    assert find_images([str(tree / "notes.txt")], outside=out) == [Source(tree / "notes.txt", "notes")]
    assert find_images([str(tree / "a.jpg"), str(tree)], outside=out) == everything  # named twice, predicted once
    again = find_images([str(tree), str(tree / "sub/../a.jpg")], outside=out)
    assert again == everything, "by another way to the same file too"


@pytest.mark.parametrize("text", ["nothing.jpg", "*.bmp", "out"])
def test_an_input_that_names_nothing_is_an_error(tree: Path, text: str) -> None:
    with pytest.raises(UserError, match="names no image"):
        find_images([str(tree / text)], outside=tree / "out")


def test_two_images_of_one_name_are_refused(tree: Path) -> None:
    (tree / "a.png").touch()
    with pytest.raises(UserError, match=r"would both become a\.png"):
        find_images([str(tree)], outside=tree / "out")
