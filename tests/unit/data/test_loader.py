"""The training stream is the same pixels however it is split, loaded or resumed; evaluation shows each image once."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from dist_deeplab.data import order
from dist_deeplab.data.loader import (
    Batch,
    EvalDataset,
    StepSampler,
    TrainDataset,
    TrainLoader,
    eval_batches,
    eval_loader,
)
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.writer import Draft, write_manifest
from dist_deeplab.data.shards.manifest import Manifest, ShardError, load_manifest
from dist_deeplab.data.shards.presence import SetContents
from dist_deeplab.data.transforms import Augmentation
from tests.unit.data import order_by_numpy

SEED, CROP, GLOBAL_SIZE, NUM_STEPS = 7, 33, 4, 5  # 20 positions of 8 samples: epochs change inside a step
AUGMENTATION = Augmentation(CROP, (0.5, 1.5), True, 255)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine's cores

Pixels = tuple[bytes, bytes, tuple[int, ...], str]


def train_loader(
    manifest: Manifest, split: BatchSplit, *, rank: int = 0, workers: int = 0, start: int = 0, stop: int = NUM_STEPS
) -> TrainLoader:
    dataset = TrainDataset(manifest, num_classes=21, augmentation=AUGMENTATION, seed=SEED)
    sampler = StepSampler(start, stop, split=split, rank=rank)
    return TrainLoader(dataset, sampler, num_workers=workers, pin_memory=False)


def samples_of(batch: Batch) -> Iterator[Pixels]:
    """Yield every sample's pixels, content rectangle and key."""
    for image, label, content, key in zip(batch.image, batch.label, batch.content, batch.keys, strict=True):
        yield image.numpy().tobytes(), label.numpy().tobytes(), tuple(content.tolist()), key


def stream_of(
    manifest: Manifest, *, world_size: int, micro_size: int, workers: int = 0, start: int = 0
) -> list[Pixels]:
    """Return the stream's samples by global position, put together from what all ranks load."""
    split = BatchSplit.derive(global_size=GLOBAL_SIZE, micro_size=micro_size, world_size=world_size)
    loaders = [train_loader(manifest, split, rank=rank, workers=workers, start=start) for rank in range(world_size)]
    stream: list[Pixels] = []
    for parts in zip(*loaders, strict=True):
        assert len({step for step, _ in parts}) == 1
        for micro_batches in zip(*(batches for _, batches in parts), strict=True):
            for batch in micro_batches:
                assert len(batch.keys) <= micro_size
                assert batch.image.shape[1:] == (3, CROP, CROP)
                assert len(batch.image) == len(batch.label) == len(batch.content) == len(batch.keys)
                stream += samples_of(batch)
    return stream


@pytest.fixture(scope="module")
def expected(shard_set: Manifest, voc_root: Path) -> list[Pixels]:
    """The stream, made from the source files one position after the other."""
    keys = (voc_root / "ImageSets/Segmentation/train.txt").read_text().split()
    stream: list[Pixels] = []
    for position in range(GLOBAL_SIZE * NUM_STEPS):
        index = order_by_numpy.samples_at(np.array([position]), num_samples=len(keys), seed=SEED)[0]
        image = cv2.imread(str(voc_root / f"JPEGImages/{keys[index]}.jpg"))[:, :, ::-1]
        label = np.array(Image.open(voc_root / f"SegmentationClass/{keys[index]}.png"))
        draws = order.uniforms(SEED, position, 4)
        image, label, content = AUGMENTATION(np.ascontiguousarray(image), label, draws)
        stream.append((image.transpose(2, 0, 1).tobytes(), label.tobytes(), content, keys[index]))
    return stream


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick("P1")
@pytest.mark.parametrize(
    ("world_size", "micro_size", "workers"),
    [
        *((1, 4, 0), (1, 2, 0), (1, 1, 0), (2, 2, 0), (2, 1, 0), (4, 1, 0)),
        *((1, 4, 1), (1, 2, 3), (2, 1, 1), (2, 2, 3), (4, 1, 1)),
        *((1, 3, 0), (3, 2, 0), (3, 1, 0), (3, 1, 3)),  # uneven; one by one on three ranks some have empty batches
    ],
)
def test_every_split_and_number_of_workers_gives_the_same_pixels(
    world_size: int, micro_size: int, workers: int, shard_set: Manifest, expected: list[Pixels]
) -> None:
    assert stream_of(shard_set, world_size=world_size, micro_size=micro_size, workers=workers) == expected


@pytest.mark.quick("P1")
@pytest.mark.parametrize("start", [1, 3, NUM_STEPS])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumed_at_any_step_is_the_rest_of_the_undisturbed_one(
    start: int, workers: int, shard_set: Manifest, expected: list[Pixels]
) -> None:
    resumed = stream_of(shard_set, world_size=2, micro_size=1, workers=workers, start=start)
    assert resumed == expected[start * GLOBAL_SIZE :]


def test_every_epoch_shows_each_image_once(shard_set: Manifest, expected: list[Pixels]) -> None:
    keys = [key for *_, key in expected]
    assert sorted(keys[:8]) == sorted(keys[8:16]) == sorted(set(keys))
    assert keys[:8] != keys[8:16]


def test_an_image_is_augmented_in_another_way_each_time(expected: list[Pixels]) -> None:
    assert len({image for image, *_ in expected}) == len(expected)


def test_photometric_distortion_is_of_seed_and_position_and_leaves_the_other_draws_alone(
    shard_set: Manifest, expected: list[Pixels]
) -> None:
    distorting = replace(AUGMENTATION, photometric=True)
    dataset = TrainDataset(shard_set, num_classes=21, augmentation=distorting, seed=SEED)
    stream = [pixels for position in range(8) for pixels in samples_of(dataset.fetch(position))]
    assert [labels for _, *labels in stream] == [labels for _, *labels in expected[:8]]
    assert sum(image != plain for (image, *_), (plain, *_) in zip(stream, expected)) >= 4
    split = BatchSplit.derive(global_size=8, micro_size=2, world_size=1)
    loader = TrainLoader(dataset, StepSampler(0, 1, split=split, rank=0), num_workers=2, pin_memory=False)
    again = [pixels for _, batches in loader for batch in batches for pixels in samples_of(batch)]
    assert again == stream


def test_another_seed_is_another_stream(shard_set: Manifest, expected: list[Pixels]) -> None:
    dataset = TrainDataset(shard_set, num_classes=21, augmentation=AUGMENTATION, seed=SEED + 1)
    assert [pixels for position in range(8) for pixels in samples_of(dataset.fetch(position))] != expected[:8]


def test_steps_are_numbered_and_hold_their_micro_batches(shard_set: Manifest) -> None:
    split = BatchSplit.derive(global_size=4, micro_size=1, world_size=2)
    loader = train_loader(shard_set, split, rank=1, start=2, stop=5)
    assert [(step, len(batches)) for step, batches in loader] == [(2, 2), (3, 2), (4, 2)]
    assert len(loader.sampler) == 6


def test_a_run_that_is_done_loads_nothing(shard_set: Manifest) -> None:
    split = BatchSplit.derive(global_size=4, micro_size=None, world_size=1)
    for start in (5, 6):
        assert list(train_loader(shard_set, split, start=start)) == []
        assert len(StepSampler(start, 5, split=split, rank=0)) == 0


@pytest.mark.parametrize(("micro_size", "workers"), [(1, 0), (4, 0), (4, 1)])
def test_a_batch_has_the_documented_layout(micro_size: int, workers: int, shard_set: Manifest) -> None:
    split = BatchSplit.derive(global_size=4, micro_size=micro_size, world_size=1)
    for _, batches in train_loader(shard_set, split, workers=workers, stop=2):
        for batch in batches:
            assert (batch.image.dtype, batch.label.dtype, batch.content.dtype) == (
                torch.uint8,
                torch.uint8,
                torch.int64,
            )
            assert batch.image.shape == (micro_size, 3, CROP, CROP)
            assert batch.label.shape == (micro_size, CROP, CROP)
            assert batch.content.shape == (micro_size, 2)
            assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_workers_ignore_the_signals_that_stop_a_run(shard_set: Manifest, expected: list[Pixels]) -> None:
    """The rank ends its workers itself, after it has saved."""
    split = BatchSplit.derive(global_size=4, micro_size=1, world_size=1)
    batches = iter(train_loader(shard_set, split, workers=1).batches)
    try:
        stream = list(samples_of(next(batches)))
        (worker,) = batches._workers
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
        for batch in batches:
            stream += samples_of(batch)
    finally:
        batches._shutdown_workers()  # a deaf worker would outlive a failure here, and pytest wait for it for ever
    assert stream == expected


RUN_THAT_LOSES_A_WORKER = textwrap.dedent(
    """
    import multiprocessing, os, signal, sys
    from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
    from dist_deeplab.data.order import BatchSplit
    from dist_deeplab.data.shards.presence import SetContents
from dist_deeplab.data.shards.manifest import load_manifest
    from dist_deeplab.data.transforms import Augmentation

    dataset = TrainDataset(
        load_manifest(sys.argv[1]), num_classes=21, augmentation=Augmentation(33, (1.0, 1.0), False, 255), seed=0
    )
    sampler = StepSampler(0, 1000, split=BatchSplit(1, 1, 1), rank=0)
    for step, _ in TrainLoader(dataset, sampler, num_workers=2, pin_memory=False):
        if step == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    """
)


def test_a_worker_killed_for_its_memory_ends_the_run_with_an_error_and_no_hang(shard_set: Manifest) -> None:
    """The interpreter ends the other workers by SIGTERM, to which they are deaf, and waits for them."""
    command = [sys.executable, "-c", RUN_THAT_LOSES_A_WORKER, str(shard_set.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "Error" in done.stderr


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.quick("P4")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 2), (11, 0), (11, 1)])
def test_evaluation_shows_each_image_once_at_any_number_of_ranks(
    world_size: int, workers: int, shard_set: Manifest, voc_root: Path
) -> None:
    shown: list[str] = []
    shares = []
    for rank in range(world_size):
        dataset = EvalDataset(shard_set, num_classes=21, ignore_label=255)
        own = eval_batches(dataset, batch_size=1, padded=True)[rank::world_size]
        loader = eval_loader(dataset, own, num_workers=workers, pin_memory=False)
        keys = [key for batch in loader for key in batch.keys]
        shares.append(len(keys))
        shown += keys
    assert sorted(shown) == (voc_root / "ImageSets/Segmentation/train.txt").read_text().split()
    assert max(shares) - min(shares) <= 1


def test_evaluation_starts_no_more_workers_than_it_has_batches(shard_set: Manifest) -> None:
    dataset = EvalDataset(shard_set, num_classes=21, ignore_label=255)
    before = set(multiprocessing.active_children())
    loader = eval_loader(dataset, [[0], [1]], num_workers=5, pin_memory=False)
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    assert len(list(loader)) == 1


def test_evaluation_shows_whole_images_padded_with_void_to_the_grid(shard_set: Manifest, voc_root: Path) -> None:
    dataset = EvalDataset(shard_set, num_classes=21, ignore_label=255)
    for batch in eval_loader(
        dataset, [[index] for index in range(len(dataset.reader))], num_workers=0, pin_memory=False
    ):
        (key,) = batch.keys
        image = cv2.imread(str(voc_root / f"JPEGImages/{key}.jpg"))[:, :, ::-1]
        label = np.array(Image.open(voc_root / f"SegmentationClass/{key}.png"))
        height, width = label.shape
        rows, columns = batch.label.shape[1:]
        assert rows % 8 == columns % 8 == 1
        assert height <= rows < height + 8
        assert width <= columns < width + 8
        assert batch.content.tolist() == [[height, width]]
        below, right = rows - height, columns - width
        assert (batch.label[0].numpy() == np.pad(label, ((0, below), (0, right)), constant_values=255)).all()
        padded = np.pad(image, ((0, below), (0, right), (0, 0)))
        assert (batch.image[0].permute(1, 2, 0).numpy() == padded).all()


# --- bad samples ------------------------------------------------------------------------------------------------------


def own_manifest(folder: Path, members: dict[str, tuple[bytes, bytes]]) -> Manifest:
    """Return a set of one shard with these (image, label) bytes, written by webdataset without any check."""
    tar = folder / "mine-000000.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        for key, (image, label) in members.items():
            writer.write({"__key__": key, "jpg": image, "png": label})
    draft = Draft("mine", LabelSpace(("a", "b", "c"), 255), SetContents(3))
    write_manifest([tar], folder / "mine.json", draft)
    return load_manifest(folder / "mine.json")


def jpeg(height: int, width: int) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 90, np.uint8))[1].tobytes()


def png(label: np.ndarray) -> bytes:
    return cv2.imencode(".png", label)[1].tobytes()


def rgb_png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = np.array([[0, 1, 2, 255]] * 3, np.uint8)
BAD: dict[str, tuple[bytes, bytes, str]] = {
    "label out of range": (jpeg(3, 4), png(np.array([[0, 1, 3, 255]] * 3, np.uint8)), "label 3 .*num_classes"),
    "sizes differ": (jpeg(3, 5), png(GOOD), "differ in size"),
    "undecodable image": (b"\xff\xd8 no more", png(GOOD), "image .* decoded"),
    "label in colour": (jpeg(3, 4), rgb_png(3, 4), "in colour"),
    "label of no bytes": (jpeg(3, 4), b"", "not a PNG"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_named_with_shard_and_key(case: str, tmp_path: Path) -> None:
    image, label, reason = BAD[case]
    manifest = own_manifest(tmp_path, {"good": (jpeg(3, 4), png(GOOD)), "bad_one": (image, label)})
    dataset = EvalDataset(manifest, num_classes=3, ignore_label=255)
    assert dataset.fetch(0).keys == ["good"]
    with pytest.raises(ShardError, match=reason) as caught:
        dataset.fetch(1)
    assert "'bad_one'" in str(caught.value)
    assert str(tmp_path / "mine-000000.tar") in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_ends_loading_with_the_same_one_sentence_from_any_process(workers: int, tmp_path: Path) -> None:
    image, label, reason = BAD["label out of range"]
    manifest = own_manifest(tmp_path, {"bad_one": (image, label)})
    train = TrainDataset(manifest, num_classes=3, augmentation=AUGMENTATION, seed=0)
    split = BatchSplit.derive(global_size=1, micro_size=None, world_size=1)
    sampler = StepSampler(0, 1, split=split, rank=0)
    evaluation = EvalDataset(manifest, num_classes=3, ignore_label=255)
    for loader in (
        TrainLoader(train, sampler, num_workers=workers, pin_memory=False),
        eval_loader(evaluation, [[0]], num_workers=workers, pin_memory=False),
    ):
        with pytest.raises(ShardError, match=reason) as caught:
            list(loader)
        assert "\n" not in str(caught.value), "not a worker's traceback"


def test_the_classes_of_the_model_decide_which_labels_are_allowed(shard_set: Manifest) -> None:
    dataset = EvalDataset(shard_set, num_classes=2, ignore_label=255)
    with pytest.raises(ShardError, match="is neither a class nor void"):
        list(eval_loader(dataset, [[index] for index in range(len(dataset.reader))], num_workers=0, pin_memory=False))
