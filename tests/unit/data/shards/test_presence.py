"""Which classes each sample contains: what packing counted, of URLs too; no stranger's file crashes or takes memory."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_deeplab.data.decode import decode_label
from dist_deeplab.data.packing.import_tars import add_presence
from dist_deeplab.data.packing.verify import verify
from dist_deeplab.data.shards.cache import ShardCache
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.presence import SetContents, read_presence
from dist_deeplab.data.shards.reader import ShardReader
from tests.file_server import serve


def change(path: Path, **changes: object) -> Manifest:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return load_manifest(path)


def put(path: Path, content: bytes) -> Manifest:
    """A set whose file of classes is this one, and is named with its digest."""
    path.with_name("train.classes.npy").write_bytes(content)
    return change(path, classes_sha256=hashlib.sha256(content).hexdigest())


def npy(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_set_knows_the_classes_of_each_sample(shard_set: Manifest) -> None:
    reader = ShardReader(shard_set)
    expected = np.zeros((8, 21), dtype=bool)
    for index in range(8):
        for value in np.unique(decode_label(reader.read(index).label)):
            if value != 255:
                expected[index, value] = True
    found = read_presence(shard_set)
    assert (found.shape, found.dtype) == ((8, 3), np.uint8)
    assert (np.unpackbits(found, axis=1, count=21, bitorder="little") == expected).all()
    for row, classes in zip(found, expected, strict=True):
        for number in range(21):
            assert bool(row[number // 8] >> (number % 8) & 1) == classes[number], "as the module says"


def test_contents_are_counted_sample_by_sample() -> None:
    contents = SetContents(9)
    assert contents.presence.shape == (0, 2)
    contents.add(np.array([1, 0, 5, 0, 0, 0, 0, 0, 2]))
    contents.add(np.zeros(9, dtype=np.int64))
    assert contents.class_pixels.tolist() == [1, 0, 5, 0, 0, 0, 0, 0, 2]
    assert contents.presence.tolist() == [[0b101, 1], [0, 0]]


def test_a_set_made_before_is_read_and_gets_the_file_when_asked(own_set: Path, shard_set: Manifest) -> None:
    own_set.with_name("train.classes.npy").unlink()
    old = change(own_set, classes=..., classes_sha256=...)
    assert (old.classes, old.num_samples) == ("", 8)
    assert ShardReader(old).read(7) == ShardReader(shard_set).read(7)
    with pytest.raises(ShardError, match=r"has no file of which classes .*`.*shards add-classes train\.json`"):
        read_presence(old)
    notes = change(own_set, notes=["cut into tiles"], tile_side=512)
    added = add_presence(notes)
    assert (added.notes, added.tile_side) == (("cut into tiles",), 512), "all else stays"
    assert read_presence(added).tolist() == read_presence(shard_set).tolist()
    assert added.classes_sha256 == shard_set.classes_sha256


def test_a_manifest_that_counts_other_pixels_gets_no_file(own_set: Path) -> None:
    own_set.with_name("train.classes.npy").unlink()
    wrong = change(own_set, classes=..., classes_sha256=..., class_pixels=[7] * 21)
    with pytest.raises(ShardError, match="pixels of the classes are not those"):
        add_presence(wrong)
    assert not own_set.with_name("train.classes.npy").exists()


def test_it_comes_from_a_url_when_it_is_needed(own_set: Path, shard_set: Manifest, tmp_path: Path) -> None:
    with serve(shutil.copytree(own_set.parent, tmp_path / "server")) as server:
        manifest = load_manifest(f"{server.url}/train.json", cache=ShardCache(tmp_path / "cache", 2**30))
        assert "/train.classes.npy" not in [path for path, _ in server.requests]
        for _ in range(2):
            assert read_presence(manifest).tolist() == read_presence(shard_set).tolist()
        assert [path for path, _ in server.requests].count("/train.classes.npy") == 1


# --- files of strangers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": "../x.npy"}, "classes"),
        ({"classes": "/etc/passwd"}, "classes"),
        ({"classes": "manifest.json"}, "classes"),
        ({"classes": 7}, "classes"),
        ({"classes": "train.index.npy"}, "one file for index and classes"),
        ({"classes": ""}, "one alone of classes and classes_sha256"),
        ({"classes_sha256": ...}, "one alone of classes and classes_sha256"),
        ({"classes_sha256": "0" * 63}, "classes_sha256"),
        ({"classes_sha256": None}, "classes_sha256"),
    ],
)
def test_names_and_digests_that_can_not_be_are_named(changes: dict[str, Any], named: str, own_set: Path) -> None:
    with pytest.raises(ShardError, match=named):
        change(own_set, **changes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"{}",
        npy(np.zeros((8, 3), np.uint8))[:-1],
        npy(np.zeros((8, 3), np.uint8)) + b"\0",
        npy(np.zeros((8, 2), np.uint8)),
        npy(np.zeros((9, 3), np.uint8)),
        npy(np.zeros(24, np.uint8)),
        npy(np.zeros((8, 3), np.int8)),
        npy(np.asfortranarray(np.zeros((8, 3), np.uint8))),
        npy(np.zeros((8, 3), np.uint8)).replace(b"(8, 3)", b"(8**9"),
        npy(np.array([[None] * 3] * 8, dtype=object)),
    ],
)
def test_a_file_that_is_not_one_of_classes_is_refused(content: bytes, own_set: Path) -> None:
    manifest = put(own_set, content)
    with pytest.raises(ShardError, match=r"train\.classes\.npy .*copy it again") as caught:
        read_presence(manifest)
    assert len(str(caught.value)) < 1000
    assert list(verify(manifest)) == [str(caught.value)]


def test_no_more_is_read_than_the_samples_need(own_set: Path) -> None:
    """A sparse file of 1 TiB, whose header fits its size."""
    rows = 2**40 // 3
    header = npy(np.zeros((8, 3), np.uint8))[:-24].replace(b"(8, 3)", f"({rows}, 3)".encode())
    header = header[:118].rstrip().ljust(127) + b"\n"
    manifest = put(own_set, header)
    with own_set.with_name("train.classes.npy").open("r+b") as file:
        file.truncate(128 + 3 * rows)
    with pytest.raises(ShardError, match=r"is not the one that .*train\.json names"):
        read_presence(manifest)


def test_a_missing_or_changed_file_is_named_where_it_is_needed_only(own_set: Path) -> None:
    path = own_set.with_name("train.classes.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="is not the one that"):
        read_presence(load_manifest(own_set))
    path.unlink()
    with pytest.raises(ShardError, match=r"train\.classes\.npy can't be read \(.*No such file"):
        read_presence(load_manifest(own_set))
    assert ShardReader(load_manifest(own_set)).read(0).key


def test_verify_compares_it_with_the_samples(own_set: Path) -> None:
    assert list(verify(load_manifest(own_set))) == []
    other = read_presence(load_manifest(own_set)).copy()
    other[3, 0] ^= 4
    assert list(verify(put(own_set, npy(other)))) == [
        f"the classes of the samples are not those that {own_set.with_name('train.classes.npy')} says"
    ]
