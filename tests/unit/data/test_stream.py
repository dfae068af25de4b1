"""The stream deals all shards to all ranks and workers, never ends, and differs where it says so."""

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dist_deeplab.data import stream as stream_module
from dist_deeplab.data.blocks import BlockShuffle
from dist_deeplab.data.loader import EvalDataset
from dist_deeplab.data.order import BatchSplit, FullShuffle
from dist_deeplab.data.shards.cache import ShardCache
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.prefetch import Plan, Prefetch
from dist_deeplab.data.stream import Place, StreamDataset, StreamLoader
from dist_deeplab.data.transforms import Augmentation
from tests.file_server import FileServer, serve
from tests.unit.data import order_by_numpy

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
WHOLE = Augmentation(81, (1.0, 1.0), False, 255)  # nothing is cut off


def dataset(manifest: Manifest, place: Place, *, sizes: tuple[int, ...] = (2, 2), max_bad: int = 0) -> StreamDataset:
    return StreamDataset(
        manifest, num_classes=21, augmentation=WHOLE, place=place, sizes=sizes, max_bad_samples=max_bad
    )


def keys(
    manifest: Manifest, *, rank: int = 0, world: int = 1, start: int = 0, steps: int = 12, workers: int = 0
) -> list[str]:
    place = Place(1, start, rank, world)
    loader = StreamLoader(dataset(manifest, place), stop=start + steps, num_workers=workers, pin_memory=False)
    found = list(loader)
    assert [step for step, _ in found] == list(range(start, start + steps))
    assert {len(batches) for _, batches in found} == {2}
    return [key for _, batches in found for batch in batches for key in batch.keys]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "SHUFFLE_BUFFER", 4)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1), (5, 0)])
def test_every_rank_gets_its_fixed_number_of_steps_and_all_samples_come(
    world: int, workers: int, shard_set: Manifest
) -> None:
    found = [keys(shard_set, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert {len(part) for part in found} == {48}
    counts = Counter(key for part in found for key in part)
    assert len(counts) == 8
    assert max(counts.values()) < 3 * min(counts.values())
    assert world == 1 or found[0] != found[1]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_each_step_has_micro_batches_of_the_sizes_of_the_split(workers: int, shard_set: Manifest) -> None:
    stream = dataset(shard_set, Place(1, 0, 0, 1), sizes=(2, 1, 0))
    for _, batches in StreamLoader(stream, stop=4, num_workers=workers, pin_memory=False):
        assert [len(batch.keys) for batch in batches] == [2, 1, 0]
        assert [batch.label.shape for batch in batches] == [(2, 81, 81), (1, 81, 81), (0, 81, 81)]


def test_a_stream_is_the_same_again_and_another_one_after_a_resume(shard_set: Manifest) -> None:
    first = keys(shard_set)
    assert keys(shard_set) == first
    assert keys(shard_set, start=6) != first[24:] + keys(shard_set)[:0]
    assert keys(shard_set, start=6)[:24] != first[:24], "not the beginning once more"


def test_each_pass_deals_each_shard_once_in_another_order(shard_set: Manifest) -> None:
    numbers = dataset(shard_set, Place(1, 0, 0, 1))._shard_numbers(0, 1)
    passes = [[next(numbers) for _ in range(3)] for _ in range(6)]
    assert all(sorted(one) == [0, 1, 2] for one in passes)
    assert len(set(map(tuple, passes))) > 1
    dealt = [dataset(shard_set, Place(1, 0, 0, 1))._shard_numbers(c, 3) for c in range(3)]
    assert sorted(next(one) for one in dealt) == [0, 1, 2], "nobody else has one's shard"


@pytest.mark.parametrize("workers", [0, 1])
def test_decoding_and_checks_are_those_of_indexed_access(workers: int, shard_set: Manifest) -> None:
    evaluation = EvalDataset(shard_set, num_classes=21, ignore_label=255)
    images = {}
    for index in range(8):
        key, image, label = evaluation.load(index)
        images[key] = image, label
    loader = StreamLoader(
        dataset(shard_set, Place(1, 0, 0, 1), sizes=(2,)), stop=4, num_workers=workers, pin_memory=False
    )
    for _, (batch,) in loader:
        for image, label, (height, width), key in zip(batch.image, batch.label, batch.content.tolist(), batch.keys):
            np.testing.assert_array_equal(image.permute(1, 2, 0)[:height, :width].numpy(), images[key][0])
            np.testing.assert_array_equal(label[:height, :width].numpy(), images[key][1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_ends_the_stream_or_is_left_out_and_told(workers: int, own_set: Path) -> None:
    tar = own_set.with_name("train-000001.tar")
    content = tar.read_bytes()
    start = content.index(b"\xff\xd8\xff")
    tar.write_bytes(content[:start] + b"\0" * 100 + content[start + 100 :])
    manifest = load_manifest(own_set)
    for max_bad in (0, 1):
        loader = StreamLoader(
            dataset(manifest, Place(1, 0, 0, 1), sizes=(2,), max_bad=max_bad),
            stop=8,
            num_workers=workers,
            pin_memory=False,
        )
        if max_bad:
            batches = [batch for _, micro_batches in loader for batch in micro_batches]
            assert all("2007_000003" not in batch.keys for batch in batches)
            assert {bad.sample for batch in batches for bad in batch.bad} == {f"2007_000003 in {tar}"}
        else:
            with pytest.raises(ShardError, match=r"sample '2007_000003' in .*train-000001\.tar"):
                list(loader)


def test_a_stream_needs_room_for_few_shards_at_a_time(shard_set: Manifest, tmp_path: Path) -> None:
    with serve(shard_set.path.parent) as server:
        limit = sum(sorted(shard.size_bytes for shard in shard_set.shards)[1:])
        manifest = load_manifest(f"{server.url}/train.json", cache=ShardCache(tmp_path / "cache", limit))
        assert len(set(keys(manifest))) == 8
        held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("[!.]*.tar"))
        assert 0 < held <= limit


# --- fetching ahead ---------------------------------------------------------------------------------------------------


def test_shards_are_fetched_ahead_in_the_order_of_their_first_use(shard_set: Manifest, tmp_path: Path) -> None:
    with serve(shard_set.path.parent) as server:
        manifest = load_manifest(f"{server.url}/train.json", cache=ShardCache(tmp_path / "cache", 2**30))
        split = BatchSplit.derive(global_size=4, micro_size=1, world_size=2)
        plan = Plan(manifest, FullShuffle(8, 5), split, rank=1, start=3, stop=50)
        prefetch = Prefetch(plan)
        assert prefetch.process.wait(60) == 0
        assert [path for path, _ in server.requests if path.endswith(".tar")] == [
            f"/train-00000{number}.tar" for _, number in plan.shards()
        ]
    positions = np.concatenate([part for step in range(3, 50) for part in split.positions(step, 1)])
    shard_of = manifest.open_index().rows(0, 8)["shard"]
    used = shard_of[order_by_numpy.samples_at(positions, num_samples=8, seed=5)].tolist()
    assert [shard for _, shard in plan.shards()] == list(dict.fromkeys(used))


def test_fetching_ahead_of_blocks_stays_a_window_ahead_of_the_training(shard_set: Manifest, tmp_path: Path) -> None:
    """16 copies of one shard at 16 names, each as large as a window: only those of the steps to come are fetched."""
    root = tmp_path / "server"
    root.mkdir()
    values, tar = json.loads(shard_set.path.read_text()), shard_set.path.with_name("train-000000.tar").read_bytes()
    shards = [values["shards"][0] | {"name": f"{number:02d}.tar"} for number in range(16)]
    for shard in shards:
        (root / shard["name"]).write_bytes(tar)
        shard["sha256"] = hashlib.sha256(tar).hexdigest()
    rows = np.tile(shard_set.open_index().rows(0, 3), 16)
    rows["shard"] = np.repeat(np.arange(16), 3)
    np.save(root / "train.index.npy", rows)
    digest = hashlib.sha256((root / "train.index.npy").read_bytes()).hexdigest()
    content = values | {"shards": shards, "num_samples": 48, "index_sha256": digest}
    (root / "train.json").write_text(json.dumps(content))
    with serve(root) as server:
        manifest = load_manifest(f"{server.url}/train.json", cache=ShardCache(tmp_path / "cache", 2**30))
        order = BlockShuffle([3] * 16, seed=1, window_shards=1, groups=1, global_size=1)
        assert order.steps_ahead == 3
        plan = Plan(manifest, order, BatchSplit(1, 1, 1, contiguous=True), rank=0, start=0, stop=10**6)
        prefetch = Prefetch(plan)

        def fetched(at_least: int) -> int:
            until = time.monotonic() + 60
            while len(asked(server)) < at_least and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.3)  # and no more come
            return len(asked(server))

        assert fetched(2) == 2, "the window of step 0, and that of step 3"
        prefetch.at(2)
        assert fetched(2) == 2
        prefetch.at(12)
        assert fetched(6) == 6
        prefetch.close()
        names = [f"/{shards[shard]['name']}" for _, shard in itertools.islice(plan.shards(), 6)]
        assert asked(server) == names, "in the order of their use"


def test_blocks_ask_again_for_a_shard_that_may_be_evicted_by_now(shard_set: Manifest) -> None:
    order = BlockShuffle([3, 3, 2], seed=1, window_shards=1, groups=1, global_size=1)
    plan = Plan(shard_set, order, BatchSplit(1, 1, 1, contiguous=True), rank=0, start=0, stop=80)
    shard_at = [int(np.searchsorted([3, 6, 8], order.sample_at(step), side="right")) for step in range(80)]
    ahead = order.steps_ahead
    assert ahead == 2
    expected = [
        (step, shard_at[step]) for step in range(80) if shard_at[step] not in shard_at[max(0, step - ahead) : step]
    ]
    assert list(plan.shards()) == expected
    assert len(expected) > 3 * 5, "ten epochs"


def asked(server: FileServer) -> list[str]:
    return [path for path, _ in server.requests if path.endswith(".tar")]


def test_fetching_ahead_ends_with_the_run(shard_set: Manifest, tmp_path: Path) -> None:
    with serve(shard_set.path.parent) as server:
        manifest = load_manifest(f"{server.url}/train.json", cache=ShardCache(tmp_path / "cache", 2**30))
        server.statuses = [503] * 10**6  # it would try for long
        prefetch = Prefetch(Plan(manifest, FullShuffle(8, 0), BatchSplit(1, 1, 1), rank=0, start=0, stop=50))
        prefetch.close()
        assert prefetch.process.returncode == 0
        assert not any(path.name.endswith(".tar") for path in os.scandir(tmp_path / "cache"))
