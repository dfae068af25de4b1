"""Data as people have it: each kind is packed as what it is, or refused in one sentence before anything is written."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.commands import score
from dist_deeplab.commands import shards as tool
from dist_deeplab.data.decode import decode_label, decode_packed
from dist_deeplab.data.packing.lists import read_pair_list, read_voc_list
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from tests.commands import exit_code

run = partial(exit_code, tool.main)
MASK = np.zeros((20, 30), np.uint8)
MASK[5:12, 4:20] = 1
IMAGE = np.dstack([np.mgrid[0:20, 0:30][0] * 9, np.mgrid[0:20, 0:30][1] * 7, MASK * 200]).astype(np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "i").mkdir()
    (tmp_path / "m").mkdir()
    (tmp_path / "names.txt").write_text("background\nblob\n")
    return tmp_path


def pack(root: Path, *options: object, images: str = "i", masks: str = "m") -> int:
    folders = ("--images", root / images, "--masks", root / masks)
    return run(*folders, "--split", "t", "--out", root / "out", *options)


def named(root: Path) -> tuple[object, ...]:
    return ("--class-names", root / "names.txt")


def packed(root: Path) -> tuple[Manifest, list[np.ndarray], list[np.ndarray]]:
    manifest = load_manifest(root / "out" / "t.json")
    samples = [ShardReader(manifest).read(index) for index in range(manifest.num_samples)]
    return manifest, [decode_packed(s.image) for s in samples], [decode_label(s.label) for s in samples]


def refusal(capsys: pytest.CaptureFixture[str], root: Path) -> str:
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not (root / "out").exists()
    return message


def save(root: Path, mask: Image.Image, *, name: str = "a.png", image: str = "a.png") -> None:
    Image.fromarray(IMAGE).save(root / "i" / image)
    mask.save(root / "m" / name)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_of_0_and_255_are_refused_with_both_remedies(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, Image.fromarray(MASK * 255))
    assert pack(root, *named(root)) == 2
    message = refusal(capsys, root)
    assert "`0 background` and `255 blob`" in message
    assert "write 1 instead of 255" in message
    (root / "map.txt").write_text("0 background\n255 blob\n")
    assert pack(root, "--label-map", root / "map.txt") == 0
    assert (packed(root)[2][0] == MASK).all()


@pytest.mark.parametrize("name", ["void", "Ignore", "unlabeled"])
def test_a_class_that_is_named_like_void_keeps_its_pixels(root: Path, name: str) -> None:
    """The list of classes decides: in a chip with cells and voids, void is what is looked for."""
    save(root, Image.fromarray(MASK * 200))
    (root / "names.txt").write_text(f"solid\n{name}\n")
    (root / "map.txt").write_text(f"0 solid\n200 {name}\n")
    assert pack(root, "--class-names", root / "names.txt", "--label-map", root / "map.txt") == 0
    assert (packed(root)[2][0] == MASK).all()


def test_void_in_all_but_one_class_is_refused_wherever_void_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, Image.fromarray(MASK))
    (root / "names.txt").write_text("void\nblob\nother\n")
    assert pack(root, *named(root), "--ignore-label", 0) == 2
    assert "the labels 1 (blob) and 0 alone, and 0 is void" in refusal(capsys, root)
    (root / "names.txt").write_text("background\nblob\n")
    save(root, Image.fromarray(np.full_like(MASK, 255)))
    assert pack(root, *named(root)) == 2
    assert "no label but void (255)" in refusal(capsys, root)


def test_a_class_at_the_index_of_void_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, Image.fromarray(MASK * 2))
    (root / "names.txt").write_text("wall\nbuilding\nsky\n")
    assert pack(root, *named(root), "--ignore-label", 0) == 2
    assert "--ignore-label 0 is the index of the class 'wall'" in refusal(capsys, root)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (Image.fromarray(MASK.astype(bool)), "a.png"),
        (Image.fromarray(MASK.astype(np.uint16)), "a.tiff"),
        (Image.fromarray(MASK.astype(np.float32)), "a.tif"),
        (Image.fromarray(np.repeat(MASK[..., None], 3, 2)), "a.PNG"),
        (Image.fromarray(MASK), "a.png.png"),
    ],
)
def test_masks_that_can_mean_one_thing_are_read(mask: Image.Image, name: str, root: Path) -> None:
    save(root, mask, name=name)
    assert pack(root, *named(root)) == 0
    assert (packed(root)[2][0] == MASK).all()


def test_carvanas_gif_masks_are_read(root: Path) -> None:
    mask = Image.fromarray(MASK)
    mask.putpalette([0, 0, 0, 255, 255, 255])
    save(root, mask, name="a_mask.gif", image="a.jpg")
    assert pack(root, *named(root), "--mask-suffix", "_mask") == 0
    assert (packed(root)[2][0] == MASK).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_levels_of_any_depth_are_read_with_a_level_map(dtype: type, root: Path) -> None:
    high = 200 if dtype is np.uint8 else 40000
    save(root, Image.fromarray(MASK.astype(dtype) * dtype(high)), name="a.tif")
    (root / "map.txt").write_text(f"0 background\n{high} blob\n")
    assert pack(root, "--label-map", root / "map.txt") == 0
    assert (packed(root)[2][0] == MASK).all()


def test_a_bilevel_mask_fits_a_map_of_0_and_255(root: Path) -> None:
    save(root, Image.fromarray(MASK.astype(bool)))
    (root / "map.txt").write_text("0 background\n255 blob\n")
    assert pack(root, "--label-map", root / "map.txt") == 0
    assert (packed(root)[2][0] == MASK).all()


def test_maps_and_names_of_cvat_roboflow_and_labelme_are_read(root: Path) -> None:
    colours = np.array([[0, 0, 0], [128, 0, 0]], np.uint8)[MASK]
    save(root, Image.fromarray(colours))
    (root / "map.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\na blob:128,0,0::\n")
    assert pack(root, "--label-map", root / "map.txt") == 0
    assert packed(root)[0].class_names == ("background", "a blob")
    save(root, Image.fromarray(MASK))
    (root / "map.txt").write_text("Pixel Value, Class\n0, background\n1, blob\n")
    assert pack(root, "--label-map", root / "map.txt", "--overwrite") == 0
    (root / "names.txt").write_text("__ignore__\n_background_\nblob\n")
    assert pack(root, *named(root), "--overwrite") == 0
    assert packed(root)[0].class_names == ("_background_", "blob")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--mask-suffix", "_mask"], []], ids=["suffix", "JPEG and PNG"])
def test_images_and_masks_may_lie_in_one_folder(options: list[str], root: Path) -> None:
    end = "_mask" if options else ""
    for name in ("x.rf.1", "y"):
        Image.fromarray(IMAGE).save(root / "i" / f"{name}.jpg")
        Image.fromarray(MASK).save(root / "i" / f"{name}{end}.png")
    assert pack(root, *named(root), *options, masks="i") == 0
    assert packed(root)[0].num_samples == 2


def test_the_option_that_would_pair_all_files_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, Image.fromarray(MASK), name="a_L.png")
    assert pack(root, *named(root)) == 2
    assert "all masks' names end in _L: give --mask-suffix _L" in refusal(capsys, root)


def test_what_is_left_out_is_counted_and_named_and_links_make_no_circle(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(root, Image.fromarray(MASK))
    (root / "elsewhere").mkdir()
    Image.fromarray(IMAGE).save(root / "elsewhere" / "b.jfif", "JPEG")
    (root / "i" / "linked").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "back").symlink_to(root / "i")
    (root / "m" / "linked").mkdir()
    Image.fromarray(MASK).save(root / "m" / "linked" / "b.png")
    for name in ("notes.xcf", ".hidden", "Thumbs.db"):
        (root / "i" / name).touch()
    Image.fromarray(MASK).save(root / "m" / "unused.png")
    assert pack(root, *named(root)) == 0
    assert packed(root)[0].num_samples == 2
    words = " ".join(capsys.readouterr().out.split())
    assert "2 files are left out" in words
    assert "notes.xcf" in words
    assert "unused.png" in words


def test_a_voc_tree_may_have_any_endings_names_and_a_second_column(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a.JPG", "b.c.png", "d e.jpg"):
        (tmp_path / "JPEGImages" / name).touch()
        (tmp_path / "SegmentationClass" / f"{Path(name).stem}.PNG").touch()
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a 1\nb.c\nd e\na.JPG\n")
    samples = read_voc_list(tmp_path, "train")
    assert [sample.key for sample in samples] == ["a", "b_c", "d_e", "a"]
    assert all(sample.image.is_file() and sample.label.is_file() for sample in samples)


@pytest.mark.parametrize("separator", ["\t", ",", ", ", " ", "   "])
def test_pairs_are_separated_by_tabs_commas_or_spaces_and_may_hold_spaces(separator: str, tmp_path: Path) -> None:
    for name in ("my photo.jpg", "my mask.png"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text(f"image{separator}label\nmy photo.jpg{separator}/my mask.png\n")
    (sample,) = read_pair_list(tmp_path, tmp_path / "list.txt")
    assert (sample.key, sample.image.name, sample.label.name) == ("my_photo", "my photo.jpg", "my mask.png")


# --- orientation, size ------------------------------------------------------------------------------------------------


def save_turned(root: Path, orientation: int, mask: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(IMAGE).save(root / "i" / "a.jpg", exif=exif, quality=95)
    Image.fromarray(mask).save(root / "m" / "a.png")


def test_photographs_are_packed_upright_and_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_turned(root, 6, np.rot90(MASK, -1))
    assert pack(root, *named(root)) == 0
    assert packed(root)[1][0].shape == (30, 20, 3)
    note = "1 image turned upright (EXIF orientation)"
    assert note in " ".join(capsys.readouterr().out.split())
    assert packed(root)[0].notes[0].startswith(note)


def test_sizes_that_fit_one_way_only_decide_and_a_switch_does_where_both_fit(root: Path) -> None:
    save_turned(root, 6, MASK)
    assert pack(root, *named(root)) == 0
    assert packed(root)[1][0].shape == (20, 30, 3), "the mask was drawn on the stored pixels"
    assert "1 image not turned upright, because masks fit only that way" in packed(root)[0].notes[0]
    save_turned(root, 3, MASK)
    assert pack(root, *named(root), "--overwrite") == 0
    upright = packed(root)[1][0]
    assert pack(root, *named(root), "--overwrite", "--exif", "ignore") == 0
    manifest, (stored,), _ = packed(root)
    assert (stored == upright[::-1, ::-1]).all()
    member = ShardReader(manifest).read(0).image
    assert member.startswith(b"\xff\xd8"), "still the JPEG, without the metadata that would turn it"
    assert b"Exif" not in member


def test_more_megapixels_than_allowed_are_refused_with_the_switch(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(root, Image.fromarray(MASK))
    assert pack(root, *named(root), "--max-megapixels", 0.0001) == 2
    assert "--max-megapixels raises the limit" in refusal(capsys, root)


def test_tiles_cover_an_image_and_say_so_in_the_manifest(root: Path) -> None:
    large, label = np.kron(IMAGE, np.ones((4, 4, 1), np.uint8)), np.kron(MASK, np.ones((4, 4), np.uint8))
    label[:, 100:] = 255
    Image.fromarray(large).save(root / "i" / "a.png")
    Image.fromarray(label).save(root / "m" / "a.png")
    assert pack(root, *named(root), "--tile", 40, "--overlap", 8) == 0
    manifest, images, labels = packed(root)
    assert (manifest.tile_side, manifest.tile_overlap) == (40, 8)
    reader = ShardReader(manifest)
    covered = np.zeros_like(label, dtype=bool)
    for index, (image, shown) in enumerate(zip(images, labels, strict=True)):
        _, top, left = reader.key(index).rsplit("_", 2)
        place = slice(int(top[1:]), int(top[1:]) + 40), slice(int(left[1:]), int(left[1:]) + 40)
        assert (image == large[place]).all()
        assert (shown == label[place]).all()
        covered[place] = True
    assert covered.all()


def test_tiles_of_void_alone_are_left_out_and_counted(root: Path) -> None:
    label = np.kron(MASK, np.ones((4, 4), np.uint8))
    label[:, 76:] = 255
    Image.fromarray(np.kron(IMAGE, np.ones((4, 4, 1), np.uint8))).save(root / "i" / "a.png")
    Image.fromarray(label).save(root / "m" / "a.png")
    assert pack(root, *named(root), "--tile", 40, "--overlap", 8) == 0
    manifest, _, labels = packed(root)
    assert len(labels) == 3 * 3, "without those that begin at 80"
    assert all((shown != 255).any() for shown in labels)
    assert "3 tiles of void alone left out" in manifest.notes[0]


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_labels_are_scored_whatever_their_endings_and_depth(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "m" / "deep").mkdir()
    (root / "i" / "deep").mkdir()
    for name, pred in (("one.png", MASK), ("two.PNG", 1 - MASK), ("deep/three.tif", MASK)):
        Image.fromarray(MASK).save(root / "m" / name)
        Image.fromarray(pred).save(root / "i" / name)
    arguments = [str(root / "i"), str(root / "m"), "--class-names", str(root / "names.txt")]
    (root / "i" / "extra.png").write_bytes((root / "i" / "one.png").read_bytes())
    assert score.main([*arguments, "--json", str(root / "s.json")]) == 0
    assert '"num_images": 3' in (root / "s.json").read_text()
    assert "1 file is left out (predictions without a label)" in capsys.readouterr().err


def test_labels_of_0_and_255_are_not_scored_as_void(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(MASK * 255).save(root / "m" / "a.png")
    Image.fromarray(MASK * 0).save(root / "i" / "a.png")
    arguments = [str(root / "i"), str(root / "m"), "--class-names", str(root / "names.txt")]
    assert score.main(arguments) == 2
    assert "255 is void: no pixel of another class" in capsys.readouterr().err
    assert score.main([*arguments, "--ignore-label", "255"]) == 0, "void is meant"
    (root / "map.txt").write_text("0 background\n255 blob\n")
    assert score.main([*arguments, "--label-map", str(root / "map.txt"), "--json", str(root / "s.json")]) == 0
    assert '"blob": 0.0' in (root / "s.json").read_text()


# --- repeat factors ---------------------------------------------------------------------------------------------------


def test_info_shows_what_a_repeat_threshold_does_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten images of road, one of which shows a tram: with a threshold of 0.4 that one comes twice an epoch."""
    for number in range(10):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
        mask = np.zeros((9, 9), np.uint8)
        mask[:2] = 1 if number == 4 else 0
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
    (tmp_path / "names.txt").write_text("road\ntram\nship\n")
    (tmp_path / "list.txt").write_text("".join(f"{number}.jpg {number}.png\n" for number in range(10)))
    packing = ["--list", tmp_path / "list.txt", "--data-root", tmp_path, "--class-names", tmp_path / "names.txt"]
    assert run(*packing, "--split", "train", "--out", tmp_path / "out") == 0
    manifest = tmp_path / "out/train.json"
    capsys.readouterr()
    assert run("info", manifest) == 0
    assert "repeat factor" not in capsys.readouterr().out
    assert run("info", manifest, "--repeat-threshold", "0.4") == 0
    words = re.sub(r"[│┃\s]+", " ", capsys.readouterr().out)
    assert "0 road 10 100.00% 1.00" in words
    assert "1 tram 1 10.00% 2.00" in words
    assert "2 ship 0 0.00% " in words
    assert "data.repeat_threshold=0.4: 10 images come some 11 times in an epoch, those of tram x2" in words
    assert "add-classes" not in words

    values = json.loads(manifest.read_text())
    expected = manifest.with_name("train.classes.npy").read_bytes(), manifest.read_bytes()
    manifest.with_name("train.classes.npy").unlink()
    manifest.write_text(json.dumps({key: value for key, value in values.items() if not key.startswith("classes")}))
    assert run("info", manifest, "--repeat-threshold", "0.4") == 0
    assert "note: training with it needs the file that" in capsys.readouterr().out
    assert run("add-classes", manifest) == 0
    assert (manifest.with_name("train.classes.npy").read_bytes(), manifest.read_bytes()) == expected


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan", "often"])
def test_a_threshold_that_is_not_a_share_is_refused(threshold: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "train.json", f"--repeat-threshold={threshold}") == 2
    assert "is not a share of the images, from 0 to 1" in capsys.readouterr().err
