"""A damaged sample is an error that names it, or is replaced by another one: the same for every split of the work."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_deeplab.data.batch import Batch
from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.index_file import IndexFile
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.data.transforms import Augmentation
from tests.unit.data import order_by_numpy

SEED, NUM_STEPS, GLOBAL_SIZE = 3, 6, 4
BAD_KEY, BAD_INDEX = "2007_000004", 4

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def change_bytes(tar: Path, name: str, change: Callable[[bytearray], None]) -> None:
    with tarfile.open(tar) as opened:
        member = opened.getmember(name)
    content = bytearray(tar.read_bytes())
    part = content[member.offset_data : member.offset_data + member.size]
    change(part)
    content[member.offset_data : member.offset_data + member.size] = part
    tar.write_bytes(content)


def flip(part: bytearray) -> None:
    part[len(part) // 2] ^= 16


def cut(part: bytearray) -> None:
    """As a truncated file has it in a tar of unchanged size."""
    part[len(part) // 2 :] = bytes(len(part) - len(part) // 2)


def wrong_index(manifest: Path) -> None:
    path = manifest.with_name("train.index.npy")
    index = np.load(path)
    index["image_offset"][BAD_INDEX] += 512
    np.save(path, index)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte in the image": (
        lambda m: change_bytes(m.with_name("train-000001.tar"), f"{BAD_KEY}.jpg", flip),
        rf"'{BAD_KEY}' in .*train-000001\.tar is damaged",
    ),
    "flipped byte in the label": (
        lambda m: change_bytes(m.with_name("train-000001.tar"), f"{BAD_KEY}.png", flip),
        rf"'{BAD_KEY}' in .*train-000001\.tar is damaged",
    ),
    "truncated JPEG": (
        lambda m: change_bytes(m.with_name("train-000001.tar"), f"{BAD_KEY}.jpg", cut),
        rf"'{BAD_KEY}' in .*train-000001\.tar is damaged",
    ),
    "an index that does not match": (wrong_index, r"sample 4 is not where the index says in .*train-000001\.tar"),
}


def dataset(manifest: Manifest, max_bad_samples: int) -> TrainDataset:
    augmentation = Augmentation(33, (0.5, 1.5), True, 255)
    return TrainDataset(manifest, num_classes=21, augmentation=augmentation, seed=SEED, max_bad_samples=max_bad_samples)


def stream(manifest: Manifest, *, world_size: int = 1, workers: int = 0, max_bad: int = 1) -> list[Batch]:
    """Return the stream as batches of one, by global position, put together from what all ranks load."""
    split = BatchSplit(GLOBAL_SIZE, 1, world_size)
    batches: list[Batch | None] = [None] * (NUM_STEPS * GLOBAL_SIZE)
    for rank in range(world_size):
        sampler = StepSampler(0, NUM_STEPS, split=split, rank=rank)
        loader = TrainLoader(dataset(manifest, max_bad), sampler, num_workers=workers, pin_memory=False)
        for step, micro_batches in loader:
            for position, batch in zip(split.positions(step, rank), micro_batches, strict=True):
                batches[position.item()] = batch
    return [batch for batch in batches if batch is not None]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_is_by_default_an_error_that_names_shard_and_key(fault: str, own_set: Path) -> None:
    damage, reason = FAULTS[fault]
    damage(own_set)
    with pytest.raises(ShardError, match=reason):
        stream(load_manifest(own_set), max_bad=0)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_is_replaced_and_all_others_stay_as_they_were(
    fault: str, shard_set: Manifest, own_set: Path
) -> None:
    expected = stream(shard_set)
    FAULTS[fault][0](own_set)
    got = stream(load_manifest(own_set))
    positions = np.arange(len(expected))
    indices = order_by_numpy.samples_at(positions, num_samples=8, seed=SEED)
    for position, (old, new) in enumerate(zip(expected, got, strict=True)):
        if indices[position] == BAD_INDEX:
            assert old.keys == [BAD_KEY] != new.keys
            assert len(new.bad) >= 1
            assert BAD_KEY in new.bad[0].problem or "sample 4" in new.bad[0].problem
        else:
            assert not new.bad
            assert (old.image == new.image).all() and (old.label == new.label).all()
    assert sum(bool(batch.bad) for batch in got) == (indices == BAD_INDEX).sum() == 3


def test_replacements_do_not_depend_on_ranks_and_workers(own_set: Path) -> None:
    FAULTS["flipped byte in the image"][0](own_set)
    manifest = load_manifest(own_set)
    expected = [(batch.keys, batch.bad, batch.image.numpy().tobytes()) for batch in stream(manifest)]
    for world_size, workers in ((2, 1), (4, 0)):
        got = stream(manifest, world_size=world_size, workers=workers)
        assert [(batch.keys, batch.bad, batch.image.numpy().tobytes()) for batch in got] == expected


def test_a_replacement_that_is_bad_too_is_replaced_as_often_as_is_allowed(own_set: Path) -> None:
    reader = ShardReader(load_manifest(own_set))
    for index in range(7):
        name = f"{reader.key(index)}.jpg"
        change_bytes(own_set.with_name(f"train-00000{index // 3}.tar"), name, flip)
    manifest = load_manifest(own_set)
    last = reader.key(7)
    assert {batch.keys[0] for batch in stream(manifest, max_bad=100)} == {last}
    with pytest.raises(ShardError, match="is damaged"):
        stream(manifest, max_bad=1)


def test_a_shard_that_vanishes_during_training_is_an_error_or_bad_samples(own_set: Path) -> None:
    manifest = load_manifest(own_set)
    loaded = dataset(manifest, 50)
    os.unlink(own_set.with_name("train-000001.tar"))
    batches = [loaded.fetch(position) for position in range(16)]
    assert {batch.keys[0] for batch in batches}.isdisjoint({"2007_000003", "2007_000004", "2007_000005"})
    assert len({bad.sample for batch in batches for bad in batch.bad}) == 3
    with pytest.raises(ShardError, match=r"cannot open the shard .*train-000001\.tar"):
        [dataset(manifest, 0).fetch(position) for position in range(16)]


def test_a_file_system_that_fails_is_an_error_that_names_the_shard(
    shard_set: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> bytes:
        raise OSError(116, "Stale file handle")

    reader = ShardReader(shard_set)
    row = reader.manifest.open_index().row(0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ShardError, match=r"the index .*train\.index\.npy can't be read: Stale file handle"):
        reader.read(0)
    monkeypatch.setattr(IndexFile, "row", lambda self, index: row)
    with pytest.raises(ShardError, match=r"cannot read the shard .*train-000000\.tar: Stale file handle"):
        reader.read(0)


def test_an_index_that_was_cut_off_after_it_was_opened_is_named(own_set: Path) -> None:
    manifest = load_manifest(own_set)
    reader, last = ShardReader(manifest), manifest.num_samples - 1
    reader.read(last)
    os.truncate(manifest.index_path, manifest.index_path.stat().st_size - 1)
    with pytest.raises(ShardError, match=r"the index .*train\.index\.npy ends too early"):
        reader.read(last)
