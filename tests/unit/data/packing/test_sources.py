"""Folders, trees and masks of all usual kinds are read as the samples they are; what does not fit is named."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.data.decode import DecodeError
from dist_deeplab.data.packing.label_map import read_label_map
from dist_deeplab.data.packing.label_statistics import count_labels
from dist_deeplab.data.packing.labels import LabelSpace, decode_mask, refuse_class_named_as_void, require_two_classes
from dist_deeplab.data.packing.samples import without_metadata
from dist_deeplab.data.packing.sources import SourceSample, read_folders, read_tree
from dist_deeplab.data.shards.manifest import ShardError

LABEL = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)
COLOURS = np.array([[128, 64, 128], [0, 0, 142], [70, 70, 70]], np.uint8)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def keys(samples: list[SourceSample]) -> list[str]:
    return [sample.key for sample in samples]


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_images_and_masks_are_paired_by_name_whatever_their_endings(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / "b.JPG", images / "sub" / "a 1.v2.png", images / "notes.txt")
    touch(masks / "b_L.PNG", masks / "sub" / "a 1.v2_L.tif", masks / "other_L.png", masks / "b.png")
    samples, left_out = read_folders(images, masks, mask_suffix="_L")
    assert left_out == [images / "notes.txt", masks / "b.png", masks / "other_L.png"]
    assert samples == [
        SourceSample("b", images / "b.JPG", masks / "b_L.PNG"),
        SourceSample("sub_a_1_v2", images / "sub" / "a 1.v2.png", masks / "sub" / "a 1.v2_L.tif"),
    ]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["i/a.jpg", "i/b.jpg", "m/a.png"], r"1 of 2 images .*b\.jpg \(expected b\.png\).*--mask-suffix"),
        (["i/a.jpg", "m/a.png", "m/a.bmp"], "two masks"),
        (["i/a b.jpg", "i/a_b.jpg", "m/a b.png", "m/a_b.png"], "both get the key 'a_b'"),
        (["i/a.txt", "m/a.png"], "no images"),
        (["m/a.png"], "no folder .*i"),
    ],
)
def test_what_can_not_be_paired_is_named(files: list[str], reason: str, tmp_path: Path) -> None:
    touch(*(tmp_path / file for file in files))
    with pytest.raises(ShardError, match=reason):
        read_folders(tmp_path / "i", tmp_path / "m")


@pytest.mark.parametrize(
    ("split", "image", "mask", "others"),
    [
        ("train", "images/training/x.jpg", "annotations/training/x.png", []),
        ("val", "img_dir/val/x.jpg", "ann_dir/val/x.png", []),
        ("val", "images/val/x.jpg", "labels/val/x.png", []),
        ("test", "test/images/x.jpg", "test/masks/x.png", []),
        ("train", "train/x.png", "trainannot/x.png", []),
        ("train", "train/x.png", "train_labels/x_L.png", []),
        (
            "train",
            "leftImg8bit/train/ulm/x_leftImg8bit.png",
            "gtFine/train/ulm/x_gtFine_labelTrainIds.png",
            ["gtFine/train/ulm/x_gtFine_color.png", "gtFine/train/ulm/x_gtFine_labelIds.png"],
        ),
    ],
)
def test_known_trees_are_read(split: str, image: str, mask: str, others: list[str], tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in (image, mask, *others)))
    (samples, left_out), layout = read_tree(tmp_path, split)
    assert left_out == sorted(tmp_path / name for name in others)
    assert [(sample.image, sample.label) for sample in samples] == [(tmp_path / image, tmp_path / mask)]
    assert keys(samples) == ["ulm_x" if layout.name == "Cityscapes" else "x"]
    with pytest.raises(ShardError, match=r"no split 'nosuch'.*--images and --masks"):
        read_tree(tmp_path, "nosuch")


def test_a_suffix_of_ones_own_takes_the_place_of_the_trees(tmp_path: Path) -> None:
    masks = [tmp_path / "annotations/val" / name for name in ("x_gt.png", "x_edge.png", "_gt.png")]
    touch(tmp_path / "images/val/x.jpg", *masks)
    (samples, _), _ = read_tree(tmp_path, "val", mask_suffix="_gt")
    assert [sample.label.name for sample in samples] == ["x_gt.png"]


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("palette", [False, True])
def test_masks_of_indices_are_read_from_any_lossless_format(form: str, palette: bool) -> None:
    image = Image.fromarray(LABEL)
    if palette:
        image.putpalette([(7 * i + 3) % 256 for i in range(768)])
    assert (decode_mask(encoded(image, form), None) == LABEL).all()


def test_a_mask_in_a_lossy_format_or_with_values_beyond_8_bits_is_refused() -> None:
    with pytest.raises(DecodeError, match="JPEG, which does not keep"):
        decode_mask(encoded(Image.fromarray(LABEL), "JPEG"), None)
    with pytest.raises(DecodeError, match=r"the value 300, .*--label-map"):
        decode_mask(encoded(Image.fromarray(LABEL.astype(np.uint16) + 45), "TIFF"), None)
    with pytest.raises(DecodeError, match=r"the value -1, .*--label-map"):  # void in many a GIS; not 255
        decode_mask(encoded(Image.fromarray(np.array([[-1, 0, 7]], dtype=np.int32)), "TIFF"), None)


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_colours_become_the_classes_that_the_map_names(form: str, tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("# CamVid's way\n128 64 128\troad\n0,0,142 car\r\n70 70 70\tcar\n0 0 0 Void\n")
    label_map, names = read_label_map(file, class_names=None, ignore_label=255)
    assert names == ("road", "car")
    colours = np.concatenate([COLOURS, np.zeros((1, 3), np.uint8)])[None]
    assert decode_mask(encoded(Image.fromarray(colours), form), label_map).tolist() == [[0, 1, 1, 255]]
    colours[0, 0] = (1, 2, 3)
    with pytest.raises(DecodeError, match=r"the colour 1 2 3, which .*map\.txt does not name"):
        decode_mask(encoded(Image.fromarray(colours), form), label_map)


def test_grey_levels_become_the_classes_that_the_map_names(tmp_path: Path) -> None:
    """Binary masks of 0 and 255 are the common case: 255 would else be void."""
    (tmp_path / "map.txt").write_text("0 background\n255 cell\n")
    label_map, names = read_label_map(tmp_path / "map.txt", class_names=["background", "cell"], ignore_label=255)
    assert names == ("background", "cell")
    mask = np.array([[0, 255]], np.uint8)
    assert decode_mask(encoded(Image.fromarray(mask), "PNG"), label_map).tolist() == [[0, 1]]
    with pytest.raises(DecodeError, match="the level 7"):
        decode_mask(encoded(Image.fromarray(mask // 36), "PNG"), label_map)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [("0 background\n255 cell\n", [0, 1]), ("0 background\n1 cell\n255 void\n", [0, 1]), ("1 cell\n0 sky\n", [1, 0])],
)
def test_a_bilevel_mask_has_the_levels_0_and_255_unless_the_map_names_1(
    lines: str, expected: list[int], tmp_path: Path
) -> None:
    (tmp_path / "map.txt").write_text(lines)
    label_map, _ = read_label_map(tmp_path / "map.txt", class_names=None, ignore_label=255)
    mask = encoded(Image.fromarray(np.array([[False, True]])), "PNG")
    assert decode_mask(mask, label_map).tolist() == [expected]


def test_masks_of_one_class_alone_are_not_taken_for_masks_of_0_and_255() -> None:
    histogram, labels = np.zeros(256, dtype=np.int64), LabelSpace(("background", "cell"), 255)
    histogram[0] = 100
    require_two_classes(histogram, labels, where="all labels")
    histogram[255] = 1
    with pytest.raises(ShardError, match="255 is void: no pixel of another class"):
        require_two_classes(histogram, labels, where="all labels")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "fewer than two"),
        ("1 2 3 a\n1 2 b\n", "line 2 .* is not"),
        ("1 2 3 a\n1 b\n", "line 2 .* is not"),
        ("1 2 3 a\n1 2 3 b\n", "line 2 .* second time"),
        ("256 1 2 a\n", "line 1"),
        ("1 a\n2 unexpected\n", "line 2 .*'unexpected'"),
        ("road\n", "line 1"),
    ],
)
def test_a_map_that_can_not_be_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(ShardError, match=reason):
        read_label_map(tmp_path / "map.txt", class_names=["a", "b"], ignore_label=255)


def test_a_class_that_would_be_numbered_as_void_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("10 sky\n20 sea\n30 void\n40 sand\n")
    with pytest.raises(ShardError, match=r"--ignore-label 2 is the index of the class 'sand'"):
        read_label_map(tmp_path / "map.txt", class_names=None, ignore_label=2)
    label_map, names = read_label_map(tmp_path / "map.txt", class_names=None, ignore_label=3)
    assert (names, label_map.labels[(30,)]) == (("sky", "sea", "sand"), 3)


def test_a_class_named_void_in_any_case_may_have_its_index() -> None:
    refuse_class_named_as_void(["sky", "Unlabeled"], 1)
    with pytest.raises(ShardError, match=r"--ignore-label 1 is the index of the class 'Sea'"):
        refuse_class_named_as_void(["sky", "Sea"], 1)


def test_a_survey_counts_pixels_and_images_and_names_all_strange_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = [rng.choice(np.array([0, 1, 7, 9, 255], np.uint8), (5, 6)) for _ in range(3)] + [np.zeros((4, 4), np.uint8)]
    samples = []
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        samples.append(SourceSample(str(number), tmp_path / f"{number}.jpg", tmp_path / f"{number}.png"))
    for workers in (1, 2):
        statistics = count_labels(samples, workers=workers)
        for value in range(256):
            assert statistics.pixels[value] == sum((mask == value).sum() for mask in masks)
            assert statistics.images[value] == sum((mask == value).any() for mask in masks)
    assert statistics.values() == [0, 1, 7, 9, 255]
    statistics.require(LabelSpace(tuple("abcdefghij"), 255))
    with pytest.raises(ShardError, match=r"0\.png .*3 of 4 masks\) holds the labels 7, 9, but classes are 0\.\.1"):
        statistics.require(LabelSpace(("a", "b"), 255))


def test_a_colour_mask_without_a_map_lists_its_colours(tmp_path: Path) -> None:
    Image.fromarray(COLOURS[[0, 1, 1, 2, 2, 2]][None]).save(tmp_path / "m.png")
    with pytest.raises(ShardError, match=r"--label-map .*70 70 70, 0 0 142, 128 64 128"):
        count_labels([SourceSample("m", tmp_path / "m.jpg", tmp_path / "m.png")])


def test_of_a_jpeg_s_metadata_only_what_turns_it_is_taken_out() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    drawn = Image.fromarray(np.arange(16 * 8 * 3, dtype=np.uint8).reshape(8, 16, 3))
    drawn.save(file, "JPEG", exif=exif, icc_profile=b"a colour profile", comment=b"a remark")
    kept = without_metadata(file.getvalue())
    assert b"Exif" not in kept
    assert b"a colour profile" in kept
    assert b"a remark" in kept
    assert (np.asarray(Image.open(io.BytesIO(kept))) == np.asarray(Image.open(file))).all()
