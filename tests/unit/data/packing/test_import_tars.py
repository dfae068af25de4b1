"""Tars made elsewhere are indexed as they are; a finished set is looked at again, and every problem is named."""

import json
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image

from dist_deeplab.data import voc
from dist_deeplab.data.packing.contact_sheet import contact_sheet
from dist_deeplab.data.packing.import_tars import IndexingOptions, index_tars
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.verify import SampleContent, inspect_set, verify
from dist_deeplab.data.shards.index import find_members
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.reader import ShardReader

LABELS = LabelSpace(voc.CLASS_NAMES, voc.IGNORE_LABEL)


def problems(path: Path) -> list[str]:
    return list(verify(load_manifest(path)))


@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_a_tar_made_by_plain_tar_with_palette_labels_is_read(form: str, voc_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    keys = (voc_root / "ImageSets/Segmentation/train.txt").read_text().split()
    for key in keys:
        shutil.copy(voc_root / f"JPEGImages/{key}.jpg", folder / f"{key}_ü.jpeg")
        shutil.copy(voc_root / f"SegmentationClass/{key}.png", folder / f"{key}_ü.seg.png")
    command = ["tar", f"--format={form}", "--sort=name", "-cf", tmp_path / "a.tar", "-C", tmp_path, "flat"]
    subprocess.run(command, check=True)
    before = (tmp_path / "a.tar").read_bytes()
    manifest = index_tars([tmp_path / "a.tar"], split="mine", labels=LABELS)
    assert (tmp_path / "a.tar").read_bytes() == before
    written = {"mine.classes.npy", "mine.index.npy", "mine.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "flat"} | written
    reader = ShardReader(manifest)
    for index, key in enumerate(keys):
        sample = reader.read(index)
        assert sample.key == f"flat/{key}_ü"
        assert sample.image == (voc_root / f"JPEGImages/{key}.jpg").read_bytes()
    assert problems(manifest.path) == []


def test_a_tar_without_samples_is_refused_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to train on")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "notes.txt", arcname="notes.txt")
    with pytest.raises(ShardError):
        index_tars([tmp_path / "a.tar"], split="mine", labels=LABELS)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "notes.txt"}


def test_an_index_made_of_our_own_tars_is_the_one_they_had(shard_set: Manifest, own_set: Path) -> None:
    names = ("train.json", "train.index.npy", "train.classes.npy")
    expected = [own_set.with_name(name).read_bytes() for name in names]
    for name in names:
        own_set.with_name(name).unlink()
    tars = [own_set.with_name(shard.name) for shard in shard_set.shards]
    manifest = index_tars(tars, split="train", labels=LABELS)
    assert [own_set.with_name(name).read_bytes() for name in names] == expected
    assert manifest.class_pixels == shard_set.class_pixels
    with pytest.raises(ShardError, match="there already"):
        index_tars(tars, split="train", labels=LABELS)


def test_a_new_index_of_a_packed_set_keeps_what_its_manifest_says_of_the_packing(
    shard_set: Manifest, own_set: Path
) -> None:
    """Else images that were cut into tiles would be scored as if they were whole."""
    values = json.loads(own_set.read_text())
    said = {"notes": ["1 image turned upright"], "tile_side": 512, "tile_overlap": 64}
    own_set.write_text(json.dumps(values | said))
    tars = [own_set.with_name(shard.name) for shard in shard_set.shards]
    again = IndexingOptions(overwrite=True)
    assert json.loads(index_tars(tars, split="train", labels=LABELS, options=again).path.read_text()) == values | said

    others = [Path(shutil.move(tar, tar.with_name(f"other-{tar.name}"))) for tar in tars]
    for tar in others:
        tar.write_bytes(tar.read_bytes() + bytes(10240))  # another file, with the same samples
    manifest = index_tars(others, split="train", labels=LABELS, options=again)
    assert (manifest.notes, manifest.tile_side) == ((), 0), "those of other tars"


def write(path: Path, members: dict[str, dict[str, bytes]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for key, sample in members.items():
            writer.write({"__key__": key, **sample})
    return path


JPEG = cv2.imencode(".jpg", np.zeros((4, 5, 3), np.uint8))[1].tobytes()
PNG = cv2.imencode(".png", np.zeros((4, 5), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        (("jpg", "png"), ("jpg", "png")),
        (("jpeg", "seg.png", "json"), ("jpeg", "seg.png")),
        (("png", "mask.png"), ("png", "mask.png")),
        (("img.png", "seg.png", "cls"), ("img.png", "seg.png")),
    ],
)
def test_members_of_usual_names_are_found(endings: tuple[str, ...], expected: tuple[str, str], tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", {"k": dict.fromkeys(endings, b"1")})
    assert tuple(find_members(tar)) == expected


def test_unusual_names_can_be_given_and_are_listed(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", {"k": {"left.jpg": JPEG, "gt_fine.png": PNG}})
    with pytest.raises(ShardError, match=r"the endings there are: gt_fine\.png, left\.jpg; see --image and --label"):
        find_members(tar)
    manifest = index_tars([tar], split="x", labels=LABELS, options=IndexingOptions("left.jpg", "gt_fine.png"))
    assert ShardReader(manifest).read(0) == ("k", JPEG, PNG)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a": {"jpg": JPEG, "png": PNG}, "b": {"jpg": JPEG}}, r"holds b\.jpg but not b\.png"),
        ({"a": {"jpg": JPEG, "png": PNG}, "b": {"png": PNG}}, r"holds b\.png but no image"),
        ({"a": {"jpg": JPEG, "png": PNG}, "b": {"jpg": JPEG[:-20], "png": PNG}}, r"sample 'b' .*can't be decoded"),
        ({"a": {"jpg": JPEG, "png": JPEG}}, r"sample 'a' .*not a PNG"),
        ({"a": {"jpg": JPEG, "png": cv2.imencode(".png", np.full((4, 5), 99, np.uint8))[1].tobytes()}}, "label 99"),
        ({"a": {"jpg": JPEG, "png": cv2.imencode(".png", np.zeros((5, 4), np.uint8))[1].tobytes()}}, "differ in size"),
    ],
)
def test_a_tar_with_a_sample_that_can_not_be_trained_on_is_refused(
    members: dict[str, dict[str, bytes]], reason: str, tmp_path: Path
) -> None:
    tar = write(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match=reason):
        index_tars([tar], split="x", labels=LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_tars_that_are_no_set_are_refused(shard_set: Manifest, tmp_path: Path) -> None:
    sample = {"k": {"jpg": JPEG, "png": PNG}}
    one, two = write(tmp_path / "1.tar", sample), write(tmp_path / "2.tar", sample)
    with pytest.raises(ShardError, match="'k' comes twice"):
        index_tars([one, two], split="x", labels=LABELS)
    with pytest.raises(ShardError, match="2 folders"):
        index_tars([one, shard_set.path.parent / "train-000000.tar"], split="x", labels=LABELS)
    with pytest.raises(ShardError, match=r"no file .*3\.tar"):
        index_tars([tmp_path / "3.tar"], split="x", labels=LABELS)


# --- looking again ----------------------------------------------------------------------------------------------------


def test_a_sound_set_has_no_problem_and_is_what_its_images_are(shard_set: Manifest) -> None:
    assert problems(shard_set.path) == []
    seen = [found for found in inspect_set(shard_set) if isinstance(found, SampleContent)]
    assert sum(found.class_pixels for found in seen).tolist() == list(shard_set.class_pixels)
    sheet = contact_sheet(shard_set, num_samples=4)
    assert sheet.dtype == np.uint8
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 20, "images and colours"
    assert contact_sheet(shard_set, num_samples=1).shape < sheet.shape


def test_captions_of_the_sheet_show_accented_letters(shard_set: Manifest) -> None:
    sheets = [
        contact_sheet(replace(shard_set, class_names=(letter,) * len(shard_set.class_names)), num_samples=1)
        for letter in "éü"
    ]
    assert sheets[0].shape == sheets[1].shape
    assert (sheets[0][-20:] != sheets[1][-20:]).any(), "the caption, at the bottom"


def flip_byte(path: Path, member: str, offset: int) -> None:
    with tarfile.open(path) as tar:
        position = tar.getmember(member).offset_data + offset
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_every_damaged_sample_is_named(shard_set: Manifest, own_set: Path) -> None:
    flip_byte(own_set.with_name("train-000000.tar"), "2007_000001.jpg", 300)
    flip_byte(own_set.with_name("train-000002.tar"), "2007_000007.png", 40)
    found = problems(own_set)
    assert len(found) == 4
    assert all(any(text in problem for problem in found) for text in ("'2007_000001'", "'2007_000007'"))
    assert sum("SHA-256" in problem for problem in found) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class_pixels": [0] * 21}, "pixels of the classes"),
        ({"keys_sha256": "0" * 64}, "keys do not have the digest"),
        ({"index_sha256": "0" * 64}, "index .* SHA-256"),
        ({"num_classes": 2, "class_names": ["a", "b"], "class_pixels": [0, 0]}, "holds the label"),
    ],
)
def test_a_manifest_that_says_something_else_is_noticed(change: dict, reason: str, own_set: Path) -> None:
    own_set.write_text(json.dumps(json.loads(own_set.read_text()) | change))
    assert any(re.search(reason, problem) for problem in problems(own_set))


def test_a_flipped_byte_that_decodes_without_complaint_is_an_error_when_read(own_set: Path) -> None:
    """JPEGs have no checksums of their own: the index has."""
    tar = own_set.with_name("train-000001.tar")
    size = os.path.getsize(tar)
    with tarfile.open(tar) as opened:
        length = opened.getmember("2007_000004.jpg").size
    flip_byte(tar, "2007_000004.jpg", length // 2)
    assert os.path.getsize(tar) == size
    reader = ShardReader(load_manifest(own_set))
    with pytest.raises(ShardError, match=r"sample '2007_000004' in .*train-000001\.tar is damaged"):
        reader.read(4)
    assert reader.read(3).key == "2007_000003"


def test_a_image_without_any_class_but_background_has_a_caption(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    tar = write(tmp_path / "a.tar", {"ü" * 90: {"jpg": JPEG, "png": PNG}})
    manifest = index_tars([tar], split="x", labels=LABELS)
    assert contact_sheet(manifest, num_samples=9).shape[2] == 3
