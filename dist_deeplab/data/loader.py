"""Loaders: an endless training stream counted in steps, and an evaluation pass that shows each image once.

Both are torch DataLoaders over *positions*; `data/order.py` says which. At this point a sample has been decoded,
checked and augmented, and is still uint8: normalisation happens on the device.
"""

import atexit
import functools
import itertools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dist_deeplab.data import order
from dist_deeplab.data.batch import BadSample, Batch, blank_batch, collate, to_batch
from dist_deeplab.data.decode import DecodeError, decode_label, decode_packed
from dist_deeplab.data.shards.manifest import Manifest, ShardError
from dist_deeplab.data.shards.prefetch import Plan, Prefetch
from dist_deeplab.data.shards.reader import Sample, ShardReader
from dist_deeplab.data.transforms import Augmentation, next_grid_size, pad_to
from dist_deeplab.errors import UserError
from dist_deeplab.workers import end_with_parent

_MAX_ATTEMPTS = 100  # at one position


class DecodingDataset(Dataset["Batch | UserError"]):
    """Decodes and checks samples of a shard set; what a bad sample is called is the same everywhere.

    An item may be the error instead of the sample: raised inside a worker it would arrive as a traceback in a string.
    The loaders below raise it.
    """

    def __init__(self, manifest: Manifest, *, num_classes: int, ignore_label: int) -> None:
        self.reader = ShardReader(manifest)
        self.invalid = np.ones(256, dtype=np.uint8)  # 1 where a label is neither a class nor void
        self.invalid[:num_classes] = self.invalid[ignore_label] = 0
        self.ignore_label = ignore_label

    def __getitem__(self, number: int) -> "Batch | UserError":
        try:
            return self.fetch(number)
        except UserError as error:
            return error

    def fetch(self, number: int) -> Batch:
        """Sample or position `number` as a batch of one."""
        raise NotImplementedError

    def load(self, index: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Key, image uint8 [H, W, 3] and label uint8 [H, W] of a sample.

        Raises:
            ShardError: undecodable, sizes that differ, or a label out of range; shard and key are named.
        """
        return self.decode(self.reader.read(index), where=self.reader.shard_name(index))

    def decode(self, sample: Sample, *, where: str) -> tuple[str, np.ndarray, np.ndarray]:
        """The same for a sample whose bytes were read from `where`."""
        import cv2

        name = f"sample {sample.key!r} in {where}"
        try:
            image, label = decode_packed(sample.image), decode_label(sample.label)
        except DecodeError as error:
            raise ShardError(f"{name}: {error}") from None
        if label.shape != image.shape[:2]:
            raise ShardError(f"{name}: image {image.shape[:2]} and label {label.shape} differ in size")
        if cv2.countNonZero(cv2.LUT(label, self.invalid)):  # a fifth of the time of numpy's indexing
            value = label[self.invalid[label] > 0][0]
            raise ShardError(f"{name}: the label {value} is neither a class nor void; see data.num_classes")
        return sample.key, image, label


class TrainDataset(DecodingDataset):
    """Global position -> augmented sample, as a batch of one.

    Where a sample is bad, others are tried in its place until `max_bad_samples` different ones were bad. Which ones
    depends on seed and position alone: the stream stays the same pixels for every split. `sample_order`: by default
    all samples are permuted together.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_classes: int,
        augmentation: Augmentation,
        seed: int,
        sample_order: order.SampleOrder | None = None,
        max_bad_samples: int = 0,
    ) -> None:
        super().__init__(manifest, num_classes=num_classes, ignore_label=augmentation.ignore_label)
        self.augmentation = augmentation
        self.seed = seed
        self.sample_order = sample_order or order.FullShuffle(manifest.num_samples, seed)
        self.max_bad_samples = max_bad_samples

    def fetch(self, number: int) -> Batch:
        """See the class."""
        index = self.sample_order.sample_at(number)
        bad: dict[int, BadSample] = {}
        for attempt in itertools.count(1):
            try:
                key, image, label = self.load(index)
                break
            except ShardError as error:
                bad[index] = BadSample(f"{index} of {self.reader.shard_name(index)}", str(error))
                if len(bad) > self.max_bad_samples or attempt == _MAX_ATTEMPTS:
                    raise
                index = order.replacement_at(number, attempt, num_samples=len(self.reader), seed=self.seed)
        draws = order.uniforms(self.seed, number, self.augmentation.num_draws)
        batch = to_batch(key, *self.augmentation(image, label, draws))
        batch.bad = list(bad.values())
        return batch


class EvalDataset(DecodingDataset):
    """Sample index -> whole image at its own size, padded to the next 8k+1, as a batch of one.

    bands: for scoring, label uint8 [H, W] -> uint8 [H, W], computed here in a worker; None: batches have no bands.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_classes: int,
        ignore_label: int,
        bands: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        super().__init__(manifest, num_classes=num_classes, ignore_label=ignore_label)
        self.bands = bands

    def fetch(self, number: int) -> Batch:
        """See the class."""
        key, image, label = self.load(number)
        height, width = label.shape
        size = next_grid_size(height), next_grid_size(width)
        batch = to_batch(key, pad_to(image, size, 0), pad_to(label, size, self.ignore_label), (height, width))
        if self.bands is not None:
            batch.bands = torch.from_numpy(pad_to(self.bands(label), size, 0))[None]
        return batch


class StepSampler(Sampler[list[int]]):
    """A rank's micro-batches of the steps `start <= step < stop`, as lists of global positions."""

    def __init__(self, start: int, stop: int, *, split: order.BatchSplit, rank: int) -> None:
        self.start, self.stop = start, stop
        self.split = split
        self.rank = rank

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * self.split.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for positions in self.split.positions(step, self.rank):
                yield positions.tolist()


class TrainLoader:
    """Iterates over `(step, micro-batches of that step)` from `start` to `stop`; restarting costs nothing.

    The same `(seed, step)` gives the same pixels at any world size, micro-batch size and number of workers.
    """

    def __init__(self, dataset: TrainDataset, sampler: StepSampler, *, num_workers: int, pin_memory: bool) -> None:
        self.sampler = sampler
        shuffle, split, rank = dataset.sample_order, sampler.split, sampler.rank
        self.plan = Plan(dataset.reader.manifest, shuffle, split, rank, sampler.start, sampler.stop)
        dataset.reader.max_open = shuffle.open_shards(split, rank)
        collate_some = functools.partial(_collate_or_blank, size=dataset.augmentation.crop_size)
        self.batches = _data_loader(dataset, sampler, collate_some, num_workers=num_workers, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        prefetch = Prefetch(self.plan) if self.plan.manifest.cache else None
        try:
            batches = raise_errors(self.batches)
            for step in range(self.sampler.start, self.sampler.stop):
                if prefetch:
                    prefetch.at(step)
                yield step, [next(batches) for _ in range(self.sampler.split.accumulation)]
        finally:
            if prefetch:
                prefetch.close()


def eval_batches(dataset: EvalDataset, *, batch_size: int, padded: bool) -> list[list[int]]:
    """All the set's indices, each once, in batches of one size, in the order of each batch's first image.

    padded: images that are of one size once padded to 8k+1 go together; else only those that are so themselves.
    """
    batches: list[list[int]] = []
    filling: dict[tuple[int, int], list[int]] = {}
    for index in range(len(dataset.reader)):
        height, width = dataset.reader.image_size(index)
        size = (next_grid_size(height), next_grid_size(width)) if padded else (height, width)
        batch = filling.get(size)
        if batch is None or len(batch) == batch_size:
            batch = filling[size] = []
            batches.append(batch)
        batch.append(index)
    return batches


def eval_loader(
    dataset: EvalDataset, batches: list[list[int]], *, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """An iterator over these batches of sample indices, each of images of one (padded) size."""
    workers = min(num_workers, len(batches))
    return raise_errors(_data_loader(dataset, batches, collate, num_workers=workers, pin_memory=pin_memory))


def raise_errors(batches: "Iterable[Batch | UserError]") -> Iterator[Batch]:
    """Yield the batches; raise the error that came instead of one."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _data_loader(  # type: ignore[no-untyped-def]
    dataset, batch_sampler, collate_fn: Callable[..., Any], *, num_workers: int, pin_memory: bool
) -> "DataLoader[Batch | UserError]":
    options = loader_options(num_workers=num_workers, pin_memory=pin_memory)
    return DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=collate_fn, **options)


def _collate_or_blank(items: "list[Batch | UserError]", *, size: int) -> "Batch | UserError":
    return collate(items) if items else blank_batch(0, size)


def loader_options(*, num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """The options that all our torch DataLoaders have in common."""
    # torch's four lines about more workers than cores, once for each loader; a run says it in one.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    if num_workers:
        atexit.unregister(_kill_workers)  # at most once
        atexit.register(_kill_workers)
    return {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "worker_init_fn": _start_worker if num_workers else None,
    }


def _kill_workers() -> None:
    """End workers that an error left behind: at its end Python asks them by SIGTERM, which they ignore, and waits."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(worker: int) -> None:
    """One thread per worker, which ignores the signals that ask the rank to stop: it ends its workers itself.

    torch's own look for the rank misses one that is killed while the worker starts: it compares the parent's id with
    what that was at the worker's start, when another process may have adopted it.
    """
    end_with_parent()
    import cv2

    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
