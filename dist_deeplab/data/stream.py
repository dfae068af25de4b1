"""`data.access: stream`: a plain webdataset pipeline, for sets that fit on no disk of a node.

Best effort, where indexed access is exact: shards are dealt to ranks and loader workers in another way in each pass,
and samples are shuffled within a buffer. So the samples of a step depend on the numbers of ranks and workers, a pass
over the set is not exactly an epoch, and a run that is resumed continues with other samples (seeded by the step it
resumes at), not with the next ones. Decoding, checks and augmentation are those of indexed access; the number of steps
is fixed, so no rank ever waits for another one that has run out.
"""

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dist_deeplab.data import order
from dist_deeplab.data.batch import BadSample, Batch, blank_batch, collate, to_batch
from dist_deeplab.data.loader import DecodingDataset, loader_options, raise_errors
from dist_deeplab.data.shards.index import IMAGE_MEMBERS, LABEL_MEMBERS
from dist_deeplab.data.shards.manifest import Manifest, ShardError
from dist_deeplab.data.shards.reader import Sample, open_shard
from dist_deeplab.data.transforms import Augmentation
from dist_deeplab.errors import UserError

SHUFFLE_BUFFER = 256  # undecoded samples per worker, some 25 MB of VOC


class Place(NamedTuple):
    """Where the stream begins, and who of how many takes it."""

    seed: int
    start: int
    rank: int
    world_size: int


class StreamDataset(IterableDataset["Batch | UserError"]):
    """Endless micro-batches for one rank's loader workers; `sizes`: images of each of the rank's in a step."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_classes: int,
        augmentation: Augmentation,
        place: Place,
        sizes: Sequence[int],
        max_bad_samples: int = 0,
    ) -> None:
        self.checks = DecodingDataset(manifest, num_classes=num_classes, ignore_label=augmentation.ignore_label)
        self.manifest = manifest
        self.augmentation = augmentation
        self.place = place
        self.sizes = sizes
        self.max_bad_samples = max_bad_samples

    def __iter__(self) -> "Iterator[Batch | UserError]":
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        consumer, consumers = self.place.rank * count + number, self.place.world_size * count
        samples = self._augmented(consumer, consumers)
        try:
            for batch in itertools.count(number, count):  # the workers' batches are taken in turns
                size = self.sizes[batch % len(self.sizes)]
                crop = self.augmentation.crop_size
                yield collate([next(samples) for _ in range(size)]) if size else blank_batch(0, crop)
        except UserError as error:  # raised in a worker it would arrive as a traceback in a string
            yield error

    def _augmented(self, consumer: int, consumers: int) -> Iterator[Batch]:
        import webdataset

        first = order.hash_integers(self.place.seed, self.place.start, consumer)
        pipeline = webdataset.DataPipeline(
            lambda: self._shards(consumer, consumers),
            webdataset.tariterators.tar_file_expander,
            webdataset.tariterators.group_by_keys,
            webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(first)),
        )
        bad: list[BadSample] = []
        for count, members in enumerate(pipeline):
            try:
                key, image, label = self.checks.decode(self._sample(members), where=members["__url__"])
            except ShardError as error:
                if len(bad) >= self.max_bad_samples:
                    raise
                bad.append(BadSample(f"{members['__key__']} in {members['__url__']}", str(error)))
                continue
            draws = order.uniforms(self.place.seed, (first + count) % 2**63, self.augmentation.num_draws)
            batch = to_batch(key, *self.augmentation(image, label, draws))
            batch.bad, bad = bad, []
            yield batch

    def _shards(self, consumer: int, consumers: int) -> "Iterator[dict[str, Any]]":
        """Yield the consumer's shards, open, endlessly; the next one is fetched while one is read."""
        numbers = self._shard_numbers(consumer, consumers)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(open_shard, self.manifest, number := next(numbers))
            while True:
                descriptor, current = coming.result(), number
                coming = ahead.submit(open_shard, self.manifest, number := next(numbers))
                with os.fdopen(descriptor, "rb") as stream:
                    yield {"url": self.manifest.shard_name(current), "stream": stream}

    def _shard_numbers(self, consumer: int, consumers: int) -> Iterator[int]:
        """Yield the shards dealt to a consumer: in each pass all shards are shuffled, and each is dealt once."""
        total = len(self.manifest.shards)
        shuffle = order.FullShuffle(total, seed=order.hash_integers(self.place.seed, self.place.start) >> 1)
        hand = 0  # the consumer's next card in an endless row of shuffled packs
        while True:
            yield shuffle.sample_at(hand * consumers + consumer)
            hand += 1

    @staticmethod
    def _sample(members: dict[str, Any]) -> Sample:
        for label in LABEL_MEMBERS:
            for image in IMAGE_MEMBERS:
                if image in members and label in members and image != label:
                    return Sample(members["__key__"], members[image], members[label])
        names = ", ".join(sorted(name for name in members if not name.startswith("__")))
        raise ShardError(
            f"sample {members['__key__']!r} in {members['__url__']} has no image and label of known names ({names}); "
            "use data.access=indexed"
        )


class StreamLoader:
    """Iterates over `(step, micro-batches of that step)` from `start` to `stop`, as `TrainLoader` does."""

    def __init__(self, dataset: StreamDataset, *, stop: int, num_workers: int, pin_memory: bool) -> None:
        self.start, self.stop, self.accumulation = dataset.place.start, stop, len(dataset.sizes)
        options = loader_options(num_workers=num_workers, pin_memory=pin_memory)
        self.batches: DataLoader[Batch | UserError] = DataLoader(
            dataset, batch_size=None, collate_fn=_unchanged, **options
        )

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        if self.start >= self.stop:
            return
        batches = raise_errors(self.batches)
        for step in range(self.start, self.stop):
            yield step, [next(batches) for _ in range(self.accumulation)]


def _unchanged(batch: Any) -> Any:
    return batch
