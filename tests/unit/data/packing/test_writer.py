"""Shards hold the source's bytes and indices, the same every time; a mistake or a kill leaves no half set."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from dist_deeplab.data import voc
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.lists import read_pair_list, read_voc_list
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.packing.writer import PackingOptions, write_shards
from dist_deeplab.data.shards.index import build_index
from dist_deeplab.data.shards.keys import keys_digest
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.reader import ShardReader

VOC_LABELS = LabelSpace(voc.CLASS_NAMES, voc.IGNORE_LABEL)


def pack(samples: list[SourceSample], out: Path, *, per_shard: int = 3, overwrite: bool = False) -> Manifest:
    return write_shards(
        samples,
        out,
        split="train",
        labels=VOC_LABELS,
        options=PackingOptions(samples_per_shard=per_shard, overwrite=overwrite),
    )


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, hidden ones too, by its path under `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def source_label(sample: SourceSample) -> np.ndarray:
    with Image.open(sample.label) as png:
        assert png.mode == "P"
        return np.array(png)


@pytest.fixture
def samples(voc_root: Path) -> list[SourceSample]:
    return read_voc_list(voc_root, "train")


@pytest.fixture
def own_samples(voc_root: Path, tmp_path: Path) -> list[SourceSample]:
    """The samples of a copy of the VOC folder that the test may damage."""
    return read_voc_list(shutil.copytree(voc_root, tmp_path / "own_voc"), "train")


# --- what a set holds -------------------------------------------------------------------------------------------------


def test_images_are_the_source_bytes_and_labels_the_source_indices(
    samples: list[SourceSample], shard_set: Manifest
) -> None:
    reader = ShardReader(shard_set)
    assert len(reader) == len(samples)
    for index, source in enumerate(samples):
        stored = reader.read(index)
        assert stored.key == source.key
        assert stored.image == source.image.read_bytes()
        with Image.open(io.BytesIO(stored.label)) as png:
            assert (png.format, png.mode) == ("PNG", "L")
            assert (np.array(png) == source_label(source)).all()


def test_plain_webdataset_reads_the_shards(samples: list[SourceSample], shard_set: Manifest) -> None:
    urls = [str(shard_set.path.parent / shard.name) for shard in shard_set.shards]
    stored = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in stored] == [source.key for source in samples]
    for sample, source in zip(stored, samples, strict=True):
        assert {key for key in sample if not key.startswith("__")} == {"jpg", "png"}
        assert sample["jpg"] == source.image.read_bytes()
        assert (np.array(Image.open(io.BytesIO(sample["png"]))) == source_label(source)).all()


@pytest.mark.parametrize(("per_shard", "sizes"), [(1, [1] * 8), (3, [3, 3, 2]), (4, [4, 4]), (8, [8]), (500, [8])])
def test_samples_fill_one_shard_after_the_other(
    per_shard: int, sizes: list[int], samples: list[SourceSample], tmp_path: Path
) -> None:
    manifest = pack(samples, tmp_path, per_shard=per_shard)
    assert [shard.num_samples for shard in manifest.shards] == sizes
    assert [shard.name for shard in manifest.shards] == [f"train-{i:06d}.tar" for i in range(len(sizes))]
    written = {"train.json", "train.index.npy", "train.classes.npy"} | {shard.name for shard in manifest.shards}
    assert set(os.listdir(tmp_path)) == written, "nothing else is left"


def test_the_manifest_says_what_the_set_holds(samples: list[SourceSample], shard_set: Manifest) -> None:
    pixels = np.zeros(256, dtype=np.int64)
    for source in samples:
        values, counts = np.unique(source_label(source), return_counts=True)
        pixels[values] += counts
    assert pixels[255] > 0
    assert shard_set.class_pixels == tuple(pixels[:21].tolist())
    assert (shard_set.split, shard_set.num_samples, shard_set.num_classes) == ("train", 8, 21)
    assert (shard_set.class_names, shard_set.ignore_label) == (voc.CLASS_NAMES, 255)
    assert shard_set.keys_sha256 == hashlib.sha256("".join(f"{s.key}\n" for s in samples).encode()).hexdigest()
    for shard in shard_set.shards:
        content = (shard_set.path.parent / shard.name).read_bytes()
        assert shard.size_bytes == len(content)
        assert shard.sha256 == hashlib.sha256(content).hexdigest()


def test_the_same_input_gives_the_same_bytes_at_another_time(
    samples: list[SourceSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(samples, tmp_path / "now")
    monkeypatch.setattr("time.time", lambda: 1e9)
    pack(samples, tmp_path / "then")
    assert read_tree(tmp_path / "now") == read_tree(tmp_path / "then")


def test_more_processes_change_nothing_but_the_time(samples: list[SourceSample], tmp_path: Path) -> None:
    many = [SourceSample(f"{s.key}_{n}", s.image, s.label) for n in range(3) for s in samples]
    for workers in (1, 2):
        write_shards(
            many,
            tmp_path / str(workers),
            split="train",
            labels=VOC_LABELS,
            options=PackingOptions(samples_per_shard=7, workers=workers),
        )
    assert read_tree(tmp_path / "1") == read_tree(tmp_path / "2")


@pytest.mark.parametrize("limit", [3500, 10])
def test_shards_may_be_limited_by_bytes(samples: list[SourceSample], tmp_path: Path, limit: int) -> None:
    """A sample above the limit gets a shard of its own; none is empty."""
    manifest = write_shards(
        samples, tmp_path, split="train", labels=VOC_LABELS, options=PackingOptions(max_shard_bytes=limit)
    )
    stored = [ShardReader(manifest).read(i) for i in range(8)]
    sizes = iter([len(sample.image) + len(sample.label) for sample in stored])
    shards = [[next(sizes) for _ in range(shard.num_samples)] for shard in manifest.shards]
    assert len(shards) > 2 and all(shards)
    for number, shard in enumerate(shards):
        assert sum(shard) <= limit or len(shard) == 1
        assert number == len(shards) - 1 or sum(shard) + shards[number + 1][0] > limit, "closed too early"


@pytest.mark.parametrize(("ending", "kept"), [("png", True), ("bmp", False), ("tiff", False)])
def test_other_images_than_jpegs_are_stored_without_loss(
    ending: str, kept: bool, samples: list[SourceSample], tmp_path: Path
) -> None:
    image = cv2.imread(str(samples[0].image))
    path = tmp_path / f"x.{ending}"
    cv2.imwrite(str(path), image)
    manifest = pack([SourceSample("x", path, samples[0].label), samples[1]], tmp_path / "out")
    stored = ShardReader(manifest).read(0)
    assert (stored.image == path.read_bytes()) is kept
    assert (cv2.imdecode(np.frombuffer(stored.image, np.uint8), cv2.IMREAD_COLOR) == image).all()
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names == ["x.png", "x.rgb.png", f"{samples[1].key}.jpg", f"{samples[1].key}.png"]


def test_the_identity_of_a_set_does_not_depend_on_how_it_is_sharded(
    samples: list[SourceSample], shard_set: Manifest, tmp_path: Path
) -> None:
    other = pack(samples[::-1], tmp_path / "other", per_shard=5)
    assert other.keys_sha256 == shard_set.keys_sha256
    assert other.class_pixels == shard_set.class_pixels
    assert pack(samples[1:], tmp_path / "less").keys_sha256 != shard_set.keys_sha256


@pytest.mark.parametrize("key", ["straße", "図_1", "k" * 96, "k" * 97, "k" * 200, "a-b_c+d", "ends_jpg"])
def test_a_key_is_read_back_as_it_was_given(key: str, samples: list[SourceSample], tmp_path: Path) -> None:
    manifest = pack([SourceSample(key, samples[0].image, samples[0].label), *samples[1:3]], tmp_path)
    assert ShardReader(load_manifest(manifest.path)).key(0) == key


@pytest.mark.parametrize("folder", ["with space", "100%", "%d", "ümlaut", "a/b/c", "data:1"])
def test_the_folder_may_have_any_name(folder: str, samples: list[SourceSample], tmp_path: Path) -> None:
    manifest = pack(samples, tmp_path / folder)
    assert len(ShardReader(load_manifest(manifest.path))) == 8


# --- what is refused --------------------------------------------------------------------------------------------------


def save_label(image: Image.Image) -> Callable[[list[SourceSample]], None]:
    return lambda samples: image.resize(Image.open(samples[4].image).size).save(samples[4].label)


def truncate(kind: str, share: float) -> Callable[[list[SourceSample]], None]:
    def damage(samples: list[SourceSample]) -> None:
        path = getattr(samples[4], kind)
        os.truncate(path, int(share * path.stat().st_size))

    return damage


def draw_label_21(samples: list[SourceSample]) -> None:
    label = source_label(samples[4])
    label[-1, -1] = 21
    Image.fromarray(label).save(samples[4].label)


def make_label_narrower(samples: list[SourceSample]) -> None:
    cv2.imwrite(str(samples[4].label), source_label(samples[4])[:, 1:])


def swap_sides(samples: list[SourceSample]) -> None:
    cv2.imwrite(str(samples[0].label), source_label(samples[0]).T)


REFUSALS: dict[str, tuple[Callable[[list[SourceSample]], object], str, str]] = {
    "mask in colour": (save_label(Image.new("RGB", (1, 1), (1, 2, 3))), "label", "not class indices"),
    "mask with alpha": (save_label(Image.new("RGBA", (1, 1))), "label", "not class indices"),
    "mask of 16 bits": (save_label(Image.new("I;16", (1, 1), 256)), "label", "the value 256"),
    "mask is a JPEG": (
        lambda samples: shutil.copy(samples[4].image, samples[4].label),
        "label",
        "a JPEG",
    ),
    "mask is empty": (truncate("label", 0), "label", "not an image"),
    "mask is truncated": (truncate("label", 0.5), "label", "damaged"),
    "label out of range": (draw_label_21, "label", "holds the label 21, but classes are 0..20 and void is 255"),
    "sizes differ": (make_label_narrower, "label", "17 x 65, .* is 16 x 65"),
    "image is missing": (lambda samples: samples[4].image.unlink(), "image", "does not exist"),
    "mask is missing": (lambda samples: samples[4].label.unlink(), "label", "does not exist"),
    "image is empty": (truncate("image", 0), "image", "not an image"),
    "image is not an image": (lambda samples: samples[4].image.write_bytes(b"\xff\xd8 no"), "image", "not an image"),
    "image is truncated": (truncate("image", 0.9), "image", "damaged"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_sample_is_refused_by_name_and_nothing_is_written(
    case: str, own_samples: list[SourceSample], tmp_path: Path
) -> None:
    damage, kind, reason = REFUSALS[case]
    damage(own_samples)
    with pytest.raises(ShardError, match=reason) as caught:
        pack(own_samples, tmp_path / "out")
    assert str(getattr(own_samples[4], kind)) in str(caught.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_transposed_label_is_refused(own_samples: list[SourceSample], tmp_path: Path) -> None:
    swap_sides(own_samples)
    with pytest.raises(ShardError, match=r"sizes differ: .* is 56 x 40, .* is 40 x 56"):
        pack(own_samples, tmp_path / "out")


def test_a_mistake_while_replacing_a_set_leaves_the_old_one(own_samples: list[SourceSample], own_set: Path) -> None:
    before = read_tree(own_set.parent)
    draw_label_21(own_samples)
    with pytest.raises(ShardError, match="21"):
        pack(own_samples, own_set.parent, overwrite=True)
    assert read_tree(own_set.parent) == before


def test_tars_of_somebody_else_are_never_replaced_unasked(samples: list[SourceSample], tmp_path: Path) -> None:
    """Tars that webdataset's own ShardWriter made have the same names, and no manifest."""
    (tmp_path / "train-000007.tar").write_bytes(b"mine")
    with pytest.raises(ShardError, match=r"train-000007\.tar is there already, without a manifest .*--overwrite"):
        pack(samples, tmp_path)
    assert (tmp_path / "train-000007.tar").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["train-000007.tar"]
    (tmp_path / "val-000000.tar").write_bytes(b"another set's")
    pack(samples, tmp_path, overwrite=True)
    assert not (tmp_path / "train-000007.tar").exists()
    assert (tmp_path / "val-000000.tar").exists()


def test_a_full_disk_leaves_nothing(
    samples: list[SourceSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", no_space)
    with pytest.raises(OSError, match="No space"):
        pack(samples, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_key_named_twice_is_refused(samples: list[SourceSample], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=f"{samples[2].key}.* twice"):
        pack([*samples, samples[2]], tmp_path)


@pytest.mark.parametrize("key", ["a.b", "a/b", "a b", "", "../a"])
def test_a_key_that_webdataset_would_cut_is_refused(key: str, samples: list[SourceSample], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds a dot, slash or space") as caught:
        pack([SourceSample(key, samples[0].image, samples[0].label)], tmp_path)
    assert repr(key) in str(caught.value)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="'train' names no samples"):
        pack([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [256, 300])
def test_more_classes_than_a_label_can_hold_are_refused(
    count: int, samples: list[SourceSample], tmp_path: Path
) -> None:
    names = tuple(f"class {number}" for number in range(count))
    with pytest.raises(ShardError, match=str(count)):
        write_shards(
            samples, tmp_path, split="train", labels=LabelSpace(names, 255), options=PackingOptions(samples_per_shard=3)
        )


@given(
    label=arrays(np.uint8, (4, 6), elements=st.sampled_from([0, 1, 2, 3, 9])),
    ignore_label=st.sampled_from([0, 3, 9, 255]),
)
def test_pixels_are_counted_by_class_and_void_is_left_out(label: np.ndarray, ignore_label: int) -> None:
    space = LabelSpace(("a", "b", "c"), ignore_label)
    values = label.ravel().tolist()
    unexpected = [value for value in values if value > 2 and value != ignore_label]
    if unexpected:
        with pytest.raises(ShardError, match=f"HERE holds the label {min(unexpected)}"):
            space.count(label, where="HERE")
    else:
        expected = [sum(v == c for v in values) if c != ignore_label else 0 for c in range(3)]
        assert space.count(label, where="HERE").tolist() == expected


# --- replacing, killing -----------------------------------------------------------------------------------------------


def test_a_set_is_replaced_only_on_request(samples: list[SourceSample], own_set: Path) -> None:
    before = read_tree(own_set.parent)
    with pytest.raises(ShardError, match=r"train\.json is there already.*--overwrite"):
        pack(samples[:2], own_set.parent)
    assert read_tree(own_set.parent) == before


def test_replacing_a_set_leaves_no_shard_of_the_old_one_and_other_sets_alone(
    samples: list[SourceSample], own_set: Path, tmp_path: Path
) -> None:
    neighbours = ("val.json", "val-000000.tar", "train_aug-000000.tar", "train-notes.tar", "train-1.tar")
    for name in neighbours:
        own_set.with_name(name).write_text("another's")
    pack(samples[:2], own_set.parent, overwrite=True)
    pack(samples[:2], tmp_path / "clean")
    assert read_tree(own_set.parent) == read_tree(tmp_path / "clean") | dict.fromkeys(neighbours, b"another's")


def run_until_killed(voc_root: Path, out: Path, place: str, count: int) -> int | None:
    """Replace the set in a process that gets `kill -9` at its call number `count` of `place`; return its exit code."""
    calls = itertools.count()
    replace = os.replace

    def kill_at_the_call() -> None:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed_progress(samples: Iterable[SourceSample]) -> Iterator[SourceSample]:
        for sample in samples:
            if place == "writing":
                kill_at_the_call()
            yield sample

    def killed_replace(source: Path, target: Path) -> None:
        if place == "replacing":
            kill_at_the_call()
        replace(source, target)

    def run() -> None:
        os.replace = killed_replace  # type: ignore[assignment]
        write_shards(
            read_voc_list(voc_root, "val"),
            out,
            split="train",
            labels=VOC_LABELS,
            options=PackingOptions(samples_per_shard=3, overwrite=True),
            progress=killed_progress,
        )

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("place", "count", "old_set_survives"),
    [("writing", 4, True), ("replacing", 2, True), ("replacing", 3, False), ("replacing", 7, False)],
)
def test_kill_9_leaves_the_old_set_or_none_and_the_next_run_a_whole_one(
    place: str, count: int, old_set_survives: bool, voc_root: Path, own_set: Path, tmp_path: Path
) -> None:
    before = read_tree(own_set.parent)
    assert run_until_killed(voc_root, own_set.parent, place, count) == -signal.SIGKILL
    if old_set_survives:
        left = {name: data for name, data in read_tree(own_set.parent).items() if not name.startswith(".")}
        assert left == before
    else:
        with pytest.raises(ShardError, match="no manifest"):
            load_manifest(own_set)
    new = read_voc_list(voc_root, "val")
    pack(new, own_set.parent, overwrite=old_set_survives)
    pack(new, tmp_path / "clean")
    assert read_tree(own_set.parent) == read_tree(tmp_path / "clean")


# --- lists ------------------------------------------------------------------------------------------------------------


def test_a_voc_list_names_the_files_of_voc(voc_root: Path) -> None:
    samples = read_voc_list(voc_root, "val")
    assert [sample.key for sample in samples] == [f"2007_{number:06d}" for number in range(5)]
    assert samples[3].image == voc_root / "JPEGImages/2007_000003.jpg"
    assert samples[3].label == voc_root / "SegmentationClass/2007_000003.png"


def test_a_voc_list_with_crlf_and_blank_lines_is_read(voc_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(voc_root, tmp_path / "root")
    (root / "ImageSets/Segmentation/mine.txt").write_bytes(b"2007_000001\r\n\r\n2007_000004\r\n")
    assert [sample.key for sample in read_voc_list(root, "mine")] == ["2007_000001", "2007_000004"]


def test_a_missing_voc_list_names_those_that_are_there(voc_root: Path) -> None:
    with pytest.raises(ShardError, match=r"test\.txt; lists there: train, val"):
        read_voc_list(voc_root, "test")


def test_a_missing_voc_folder_says_which_to_give(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="JPEGImages"):
        read_voc_list(tmp_path / "absent", "train")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_list_of_pairs_is_read_as_drsleeps_are(newline: str, slash: str, tmp_path: Path) -> None:
    lines = [f"{slash}JPEGImages/a.jpg {slash}Labels/a.png", "", f"{slash}x/b.JPG\t{slash}y/other.png", "   "]
    listing = tmp_path / "list.txt"
    listing.write_bytes(newline.join(lines).encode())
    assert read_pair_list(tmp_path, listing) == [
        SourceSample("a", tmp_path / "JPEGImages/a.jpg", tmp_path / "Labels/a.png"),
        SourceSample("b", tmp_path / "x/b.JPG", tmp_path / "y/other.png"),
    ]


@pytest.mark.parametrize("line", ["only_one.jpg", "a.jpg b.png c.png"])
def test_a_line_that_is_not_a_pair_is_named_with_its_number(line: str, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(f"a.jpg a.png\n\n{line}\n")
    with pytest.raises(ShardError, match=r"line 3 of .*list\.txt") as caught:
        read_pair_list(tmp_path, listing)
    assert line in str(caught.value)


def test_a_missing_list_of_pairs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"absent\.txt"):
        read_pair_list(tmp_path, tmp_path / "absent.txt")


def test_a_list_that_is_not_text_is_named(voc_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(voc_root, tmp_path / "root")
    (root / "ImageSets/Segmentation/binary.txt").write_bytes(b"\xff\xfe2\x000\x00")
    with pytest.raises(ShardError, match=r"binary\.txt"):
        read_pair_list(root, root / "ImageSets/Segmentation/binary.txt")
    with pytest.raises(ShardError, match=r"binary\.txt"):
        read_voc_list(root, "binary")


def test_a_byte_order_mark_is_not_part_of_the_first_key(voc_root: Path, tmp_path: Path) -> None:
    root = shutil.copytree(voc_root, tmp_path / "root")
    (root / "ImageSets/Segmentation/mine.txt").write_bytes(b"\xef\xbb\xbf2007_000001\n")
    assert read_voc_list(root, "mine")[0].key == "2007_000001"


# --- the index of any tar ---------------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes], *, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_points_at_the_bytes_of_tars_made_elsewhere(form: int, tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / "0.tar", {"b.png": b"2", "b.jpg": b"1" * 600, "b.json": b"{}"}, form=form),
        write_tar(tmp_path / "1.tar", {"x/c.jpg": b"", "x/c.png": b"4" * 512, "readme": b"?"}, form=form),
    ]
    indexed = build_index(tars, tmp_path / "index.npy")
    assert indexed == ([1, 1], keys_digest(["x/c", "b"]))
    index = np.load(tmp_path / "index.npy")
    assert index["shard"].tolist() == [0, 1]
    for row, (image, label) in zip(index, [(b"1" * 600, b"2"), (b"", b"4" * 512)], strict=True):
        content = tars[row["shard"]].read_bytes()
        assert content[row["image_offset"] :][: row["image_size"]] == image
        assert content[row["label_offset"] :][: row["label_size"]] == label


@pytest.mark.parametrize(
    "second", [{"a.rgb.png": b"3"}, {"a.jpg": b"3"}, {"a.png": b"3"}], ids=["image", "same name", "label"]
)
def test_two_images_or_labels_under_one_key_are_refused(second: dict[str, bytes], tmp_path: Path) -> None:
    """Not the last one taken, nor the first: which is meant, only the user knows."""
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": b"1", "a.png": b"2"})
    with tarfile.open(tar, "a") as opened:
        for name, data in second.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    with pytest.raises(ShardError, match=r"0\.tar holds (two images of the sample 'a'|a\.(jpg|png) twice)"):
        build_index([tar], tmp_path / "index.npy")


def test_a_sample_without_its_label_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": b"1", "a.png": b"2", "b.jpg": b"3"})
    with pytest.raises(ShardError, match=r"0\.tar holds b\.jpg but not b\.png"):
        build_index([tar], tmp_path / "index.npy")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "readable"), (b"no tar at all" * 100, "readable"), (b"\x1f\x8b compressed", "compressed.*gunzip")],
)
def test_a_file_that_is_not_a_tar_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ShardError, match=rf"0\.tar .*{reason}"):
        build_index([tmp_path / "0.tar"], tmp_path / "index.npy")


def test_a_tar_cut_inside_a_member_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": b"1" * 2000, "a.png": b"2" * 3000})
    os.truncate(tar, 4500)
    with pytest.raises(ShardError, match=r"0\.tar"):
        build_index([tar], tmp_path / "index.npy")


def test_a_power_cut_leaves_a_manifest_only_beside_whole_shards_and_index(
    samples: list[SourceSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents are on the disk before the manifest has its name, and all names at the end."""
    fsync, replace = os.fsync, os.replace
    synced: list[int] = []
    before_manifest: list[set[int]] = []

    def record_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_replace(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if Path(target) == tmp_path / "set" / "train.json":
            before_manifest.append(set(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    pack(samples, tmp_path / "set")
    files = {path.name: path.stat().st_ino for path in (tmp_path / "set").iterdir() if path.is_file()}
    assert {"train.json", "train.index.npy", "train-000000.tar"} <= files.keys()
    assert [name for name, inode in files.items() if inode not in before_manifest[-1]] == []
    assert synced[-1] == (tmp_path / "set").stat().st_ino


def test_the_manifest_is_plain_json(shard_set: Manifest) -> None:
    values = json.loads(shard_set.path.read_text())
    assert "path" not in values, "a set may be moved"
    assert values["shards"][2]["name"] == "train-000002.tar"
