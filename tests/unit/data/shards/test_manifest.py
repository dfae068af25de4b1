"""A sample is read by position as the tar holds it, from any process; what does not fit together is an error."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.data import voc
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.lists import read_voc_list
from dist_deeplab.data.packing.writer import PackingOptions, write_shards
from dist_deeplab.data.shards.index_file import INDEX_DTYPE_1
from dist_deeplab.data.shards.keys import DuplicateKeyError, key_hash, keys_digest, unique_keys_digest
from dist_deeplab.data.shards.manifest import FORMAT, Manifest, ShardError, check_sizes, load_manifest, require_fit
from dist_deeplab.data.shards.reader import Sample, ShardReader
from dist_deeplab.errors import UserError


def read_with_tarfile(manifest: Manifest) -> list[Sample]:
    """Return all samples in the order of the shards, by the standard library."""
    samples = []
    for shard in manifest.shards:
        with tarfile.open(manifest.path.parent / shard.name) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in content:
            key, ending = name.split(".")
            if ending == "jpg":
                samples.append(Sample(key, content[name], content[f"{key}.png"]))
    return samples


def open_shards(folder: Path) -> int:
    """Return how many files of `folder` this process has open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{descriptor}"):
            links.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
    return sum(link.startswith(str(folder)) and link.endswith(".tar") for link in links)


def change_manifest(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_sample_equals_what_tarfile_reads(shard_set: Manifest) -> None:
    reader = ShardReader(shard_set)
    expected = read_with_tarfile(shard_set)
    assert len(reader) == len(expected) == 8
    order = list(range(8)) * 3
    random.Random(0).shuffle(order)
    for index in order:
        assert reader.read(index) == expected[index]
        assert reader.key(index) == expected[index].key


def test_a_manifest_reads_back_as_it_was_written(shard_set: Manifest) -> None:
    assert load_manifest(str(shard_set.path)) == shard_set
    assert json.loads(shard_set.path.read_text())["format"] == FORMAT == "dist_deeplab.shards/2"


def test_a_set_may_be_moved(shard_set: Manifest, own_set: Path) -> None:
    assert ShardReader(load_manifest(own_set)).read(7) == ShardReader(shard_set).read(7)


@given(keys=st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True))
def test_the_digest_of_keys_does_not_depend_on_their_order(keys: list[str]) -> None:
    expected = hashlib.sha256("".join(key + "\n" for key in sorted(keys)).encode()).hexdigest()
    assert keys_digest(keys) == keys_digest(keys[::-1]) == expected
    assert keys_digest([*keys, "one more"]) != expected


def test_a_reader_that_has_read_pickles_without_its_files(shard_set: Manifest) -> None:
    reader = ShardReader(shard_set)
    expected = [reader.read(index) for index in range(8)]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.read(index) for index in range(8)] == expected
    del copy
    assert [reader.read(index) for index in range(8)] == expected, "the copy closed files of its own only"


def test_a_spawned_process_reads_the_same(shard_set: Manifest) -> None:
    reader = ShardReader(shard_set)
    expected = reader.read(5)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(reader.read, [5, 0])) == [expected, reader.read(0)]


def test_forked_processes_share_open_files_without_disturbing_each_other(shard_set: Manifest) -> None:
    reader = ShardReader(shard_set)
    expected = [reader.read(index) for index in range(8)]
    context = multiprocessing.get_context("fork")
    rng = random.Random(1)
    children = []
    for child in range(3):
        order = [rng.randrange(8) for _ in range(300)]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=lambda s, o: s.send(all(reader.read(i) == expected[i] for i in o)), args=(sender, order)
        )
        process.start()
        children.append((process, receiver))
        assert all(reader.read(i) == expected[i] for i in order[:100]), f"the parent, beside child {child}"
    for process, receiver in children:
        assert receiver.recv()
        process.join()
    assert [reader.read(index) for index in range(8)] == expected


def test_a_reader_keeps_few_shards_open_and_closes_them(shard_set: Manifest) -> None:
    folder = shard_set.path.parent
    before = open_shards(folder)
    reader = ShardReader(shard_set, max_open=2)
    expected = read_with_tarfile(shard_set)
    for index in [0, 3, 6, 0, 7, 4, 1, 6, 3]:
        assert reader.read(index) == expected[index]
        assert open_shards(folder) <= before + 2
    del reader
    assert open_shards(folder) == before


# --- what does not fit together ---------------------------------------------------------------------------------------


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"train\.json; `.* shards` makes one") as caught:
        load_manifest(tmp_path / "train.json")
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'"text"', b'{"format": "other/1"}'])
def test_a_file_that_is_not_a_manifest_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(ShardError, match="manifest") as caught:
        load_manifest(path)
    assert str(path) in str(caught.value)


def test_a_shard_or_a_folder_given_as_manifest_is_named(shard_set: Manifest) -> None:
    for path in (shard_set.path.parent / shard_set.shards[0].name, shard_set.path.parent):
        with pytest.raises(ShardError, match=r"give the \.json"):
            load_manifest(path)


@pytest.mark.parametrize(
    "key", ["split", "num_samples", "num_classes", "class_names", "class_pixels", "keys_sha256", "index", "shards"]
)
def test_an_incomplete_manifest_says_what_is_missing(key: str, own_set: Path) -> None:
    change_manifest(own_set, **{key: ...})
    with pytest.raises(ShardError, match=f"does not fit this version of dist_deeplab .*{key}"):
        load_manifest(own_set)


def test_an_empty_set_is_refused(own_set: Path) -> None:
    change_manifest(own_set, num_samples=0)
    with pytest.raises(ShardError, match=r"the set .*train\.json is empty; make"):
        load_manifest(own_set)


def test_a_missing_shard_is_named(own_set: Path) -> None:
    shard = own_set.with_name("train-000001.tar")
    shard.unlink()
    with pytest.raises(ShardError, match="is missing") as caught:
        load_manifest(own_set)
    assert str(shard) in str(caught.value)


def test_a_folder_in_the_place_of_a_shard_is_none_whatever_its_size(own_set: Path) -> None:
    shard = own_set.with_name("train-000001.tar")
    shard.unlink()
    shard.mkdir()
    shards = json.loads(own_set.read_text())["shards"]
    shards[1]["size_bytes"] = shard.stat().st_size
    change_manifest(own_set, shards=shards)
    with pytest.raises(ShardError, match=r"train-000001\.tar is missing"):
        load_manifest(own_set)


@pytest.mark.parametrize("change", [-1, -600, 1])
def test_a_shard_of_another_size_is_named_with_both_sizes(change: int, own_set: Path) -> None:
    shard = own_set.with_name("train-000002.tar")
    size = shard.stat().st_size
    content = shard.read_bytes() + b"\0"
    shard.write_bytes(content[: size + change])
    with pytest.raises(ShardError, match=f"has {size + change:,} bytes, not {size:,}") as caught:
        load_manifest(own_set)
    assert str(shard) in str(caught.value)


def test_a_missing_index_is_named(own_set: Path) -> None:
    own_set.with_name("train.index.npy").unlink()
    with pytest.raises(ShardError, match=r"train\.index\.npy"):
        load_manifest(own_set)


@pytest.mark.parametrize("length", [0, 5, 100, 300])
def test_a_truncated_index_is_named(length: int, own_set: Path) -> None:
    index = own_set.with_name("train.index.npy")
    index.write_bytes(index.read_bytes()[:length])
    with pytest.raises(ShardError, match=r"train\.index\.npy"):
        load_manifest(own_set)


@pytest.mark.parametrize("what", ["shorter", "longer", "other type", "pickled"])
def test_an_index_of_another_shape_or_kind_is_refused(what: str, own_set: Path) -> None:
    path = own_set.with_name("train.index.npy")
    index = np.load(path)
    other = {
        "shorter": index[:-1],
        "longer": np.concatenate([index, index[:1]]),
        "other type": index["image_offset"],
        "pickled": np.array([{}] * 8, dtype=object),
    }[what]
    np.save(path, other)
    with pytest.raises(ShardError, match=r"train\.index\.npy"):
        load_manifest(own_set)


def test_no_sample_is_read_by_the_index_of_another_set_of_as_many_samples(own_set: Path, voc_root: Path) -> None:
    """The first image of any shard begins at byte 512: its header is right even where everything else is wrong."""
    samples = read_voc_list(voc_root, "train")
    other = write_shards(
        samples[1:] + samples[:1],
        own_set.parent / "other",
        split="train",
        labels=LabelSpace(voc.CLASS_NAMES, voc.IGNORE_LABEL),
        options=PackingOptions(samples_per_shard=3),
    )
    shutil.copy(other.path.with_name("train.index.npy"), own_set.with_name("train.index.npy"))
    reader = ShardReader(load_manifest(own_set))
    for index in range(8):
        with pytest.raises(ShardError, match="not where the index says"):
            reader.read(index)


@pytest.mark.parametrize("field", ["image_offset", "image_size", "label_offset", "label_size"])
def test_an_index_that_is_wrong_in_one_number_is_noticed(field: str, own_set: Path) -> None:
    path = own_set.with_name("train.index.npy")
    index = np.load(path)
    index[field][4] += 512 if "offset" in field else -1
    np.save(path, index)
    reader = ShardReader(load_manifest(own_set))
    with pytest.raises(ShardError, match="sample 4"):
        reader.read(4)


def test_an_index_that_names_a_shard_too_many_is_noticed(own_set: Path) -> None:
    path = own_set.with_name("train.index.npy")
    index = np.load(path)
    index["shard"][4] = 3
    np.save(path, index)
    reader = ShardReader(load_manifest(own_set))
    with pytest.raises(ShardError, match=r"sample 4 of .* is in no shard of the set"):
        reader.read(4)


def test_a_shard_overwritten_by_zeros_is_noticed(own_set: Path) -> None:
    shard = own_set.with_name("train-000000.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    reader = ShardReader(load_manifest(own_set))
    with pytest.raises(ShardError, match=r"train-000000\.tar"):
        reader.read(0)
    assert reader.read(3).key, "the other shards are sound"


def test_a_shard_truncated_or_removed_during_training_is_an_error_not_a_crash(own_set: Path) -> None:
    """Where a memory map would end the process by SIGBUS."""
    reader = ShardReader(load_manifest(own_set))
    reader.read(0)
    os.truncate(own_set.with_name("train-000000.tar"), 2048)
    with pytest.raises(ShardError, match=r"sample 2 .*train-000000\.tar"):
        reader.read(2)
    own_set.with_name("train-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"cannot open the shard .*train-000001\.tar: No such file"):
        reader.read(3)


def test_labels_for_another_model_are_refused_with_the_remedy(shard_set: Manifest) -> None:
    require_fit(shard_set, num_classes=21, ignore_label=255)
    with pytest.raises(ShardError, match=r"21 classes but the model has 19; set data\.num_classes=21"):
        require_fit(shard_set, num_classes=19, ignore_label=255)
    with pytest.raises(ShardError, match=r"void by 255, not 0; set data\.ignore_label=255"):
        require_fit(shard_set, num_classes=21, ignore_label=0)


# --- manifests and indexes of strangers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_samples": -8}, "num_samples = -8"),
        ({"num_samples": 8.0}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"num_samples": 10**400}, "num_samples"),
        ({"num_samples": 9}, "9 samples has 8 samples in its shards"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 22}, "22 classes .* has 21 class_names"),
        ({"class_pixels": [1]}, "has 1 class_pixels"),
        ({"class_pixels": [-1] * 21}, r"class_pixels\.0 = -1"),
        ({"ignore_label": 999}, "ignore_label = 999"),
        ({"ignore_label": -1}, "ignore_label"),
        ({"split": "../../x"}, "split"),
        ({"keys_sha256": ""}, "keys_sha256"),
        ({"index_sha256": ""}, "index_sha256"),
        ({"index_sha256": None}, "index_sha256"),
        ({"index": ".."}, "index"),
        ({"index": "/etc/passwd"}, "index"),
        ({"index": "manifest.json"}, "index"),
        ({"index": "a\0.npy"}, "index"),
        ({"shards": {}}, "shards"),
        ({"shards": []}, "0 samples in its shards"),
        ({"format": 1}, "not a 'dist_deeplab"),
        ({"surprise": 1}, "does not fit this version .*surprise"),
    ],
)
def test_values_that_can_not_be_are_named(changes: dict[str, Any], named: str, own_set: Path) -> None:
    change_manifest(own_set, **changes)
    with pytest.raises(ShardError, match=named) as caught:
        load_manifest(own_set)
    assert str(own_set) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size_bytes": -1}, "size_bytes = -1"),
        ({"num_samples": -3}, "num_samples"),
        ({"sha256": None}, "sha256 = null"),
        ({"sha256": ""}, "sha256"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"sha256": "0" * 64 + "\n"}, "sha256"),
        ({"name": ".."}, "name"),
        ({"name": "."}, "name"),
        ({"name": ""}, "name"),
        ({"name": "../train-000000.tar"}, "name"),
        ({"name": 7}, "name"),
        ({"name": "train-000001.tar"}, "a shard named twice"),
        ({"more": 1}, r"shards\.0\.more"),
    ],
)
def test_shards_that_can_not_be_are_named(changes: dict[str, Any], named: str, own_set: Path) -> None:
    shards = json.loads(own_set.read_text())["shards"]
    change_manifest(own_set, shards=[shards[0] | changes, *shards[1:]])
    with pytest.raises(ShardError, match=named):
        load_manifest(own_set)


@pytest.mark.parametrize("field", ["header_offset", "image_offset", "image_size", "label_offset", "label_size"])
@pytest.mark.parametrize("value", [-1, -(2**62), 2**62, 2**40, 0])
def test_an_index_of_a_stranger_never_takes_memory_or_crashes(field: str, value: int, own_set: Path) -> None:
    path = own_set.with_name("train.index.npy")
    index = np.load(path)
    if index[field][0] == value:
        return
    index[field][0] = value
    np.save(path, index)
    reader = ShardReader(load_manifest(own_set))
    with pytest.raises(ShardError, match="sample 0 is not where the index says"):
        reader.read(0)
    assert reader.read(1).key


# --- format 1, key hashes ---------------------------------------------------------------------------------------------


def as_format_1(path: Path) -> Path:
    """Turn a set into one as it was written before: an index without sizes."""
    index_path = path.with_name("train.index.npy")
    index = np.load(index_path)
    old = np.zeros(len(index), dtype=INDEX_DTYPE_1)
    for name in INDEX_DTYPE_1.names or ():
        old[name] = index[name]
    np.save(index_path, old)
    digest = hashlib.sha256(index_path.read_bytes()).hexdigest()
    change_manifest(path, format="dist_deeplab.shards/1", index_sha256=digest)
    return path


def test_a_set_of_format_1_reads_as_the_same_set(own_set: Path, shard_set: Manifest) -> None:
    new, old = ShardReader(shard_set), ShardReader(load_manifest(as_format_1(own_set)))
    for index in range(8):
        assert old.read(index) == new.read(index)
        assert old.image_size(index) == new.image_size(index)
    assert old.manifest.key_hashes.tolist() == shard_set.key_hashes.tolist()
    assert old.manifest.keys_sha256 == shard_set.keys_sha256


def test_sizes_come_from_the_index_without_opening_a_shard(own_set: Path, shard_set: Manifest) -> None:
    manifest = load_manifest(own_set)
    expected = [cv2.imdecode(np.frombuffer(s.label, np.uint8), 0).shape for s in read_with_tarfile(manifest)]
    for shard in manifest.shards:
        own_set.with_name(shard.name).unlink()
    reader = ShardReader(manifest)
    assert [reader.image_size(index) for index in range(8)] == expected
    assert open_shards(own_set.parent) == 0


def test_key_hashes_are_the_smallest_and_own_their_memory(own_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = sorted(key_hash(sample.key) for sample in read_with_tarfile(load_manifest(own_set)))
    monkeypatch.setattr("dist_deeplab.data.shards.manifest.MAX_KEY_HASHES", 3)
    monkeypatch.setattr("dist_deeplab.data.shards.index_file._CHUNK_ROWS", 2)
    hashes = load_manifest(own_set).key_hashes
    assert hashes.tolist() == every[:3]
    assert hashes.base is None, "a view would keep the whole index alive"


def test_a_rank_that_is_not_its_nodes_first_checks_a_shard_when_it_opens_it(own_set: Path) -> None:
    shard = own_set.with_name("train-000001.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    manifest = load_manifest(own_set, check_shards=False)
    reader = ShardReader(manifest)
    assert reader.read(0).key
    with pytest.raises(ShardError, match=r"train-000001\.tar has [\d,]+ bytes, not"):
        reader.read(3)
    with pytest.raises(ShardError, match=r"train-000001\.tar has [\d,]+ bytes, not"):
        check_sizes(manifest)


@given(keys=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")), max_size=20))
def test_keys_sorted_in_files_have_the_digest_of_those_sorted_in_memory(keys: list[str]) -> None:
    expected = keys_digest(keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_deeplab.data.shards.keys._RUN", 3)
        assert keys_digest(iter(keys)) == expected
        if len(set(keys)) < len(keys):
            with pytest.raises(DuplicateKeyError) as caught:
                unique_keys_digest(keys)
            assert keys.count(caught.value.args[0]) > 1
        else:
            assert unique_keys_digest(keys) == expected
