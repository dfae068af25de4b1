"""The pixels that training sees in a sample order: the same however the work is cut."""

from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import BatchSplit, SampleOrder
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.data.transforms import Augmentation

AUGMENTATION = Augmentation(33, (0.5, 1.5), True, 255)
NUM_STEPS, GLOBAL_SIZE = 8, 6


def pixels_of(
    manifest: Manifest, order: SampleOrder, split: BatchSplit, *, workers: int = 0, start: int = 0
) -> dict[int, bytes]:
    """{position: pixels} of the steps from `start` on, over all ranks."""
    pixels = {}
    for rank in range(split.world_size):
        dataset = TrainDataset(manifest, num_classes=21, augmentation=AUGMENTATION, seed=5, sample_order=order)
        sampler = StepSampler(start, NUM_STEPS, split=split, rank=rank)
        for step, micro_batches in TrainLoader(dataset, sampler, num_workers=workers, pin_memory=False):
            for positions, batch in zip(split.positions(step, rank), micro_batches, strict=True):
                for position, image in zip(positions.tolist(), batch.image, strict=True):
                    pixels[position] = image.numpy().tobytes()
    return pixels


def assert_the_same_for_any_split_worker_count_and_start(
    manifest: Manifest, order: SampleOrder, *, contiguous: bool
) -> None:
    """Micro-batches, ranks, workers and a restart change no pixel of any position."""

    def split(micro_size: int, world_size: int) -> BatchSplit:
        return BatchSplit(GLOBAL_SIZE, micro_size, world_size, contiguous)

    expected = pixels_of(manifest, order, split(6, 1))
    assert set(expected) == set(range(NUM_STEPS * GLOBAL_SIZE))
    for micro_size, world_size in ((2, 1), (3, 2), (1, 4)):
        assert pixels_of(manifest, order, split(micro_size, world_size)) == expected
    assert pixels_of(manifest, order, split(2, 2), workers=2) == expected
    later = pixels_of(manifest, order, split(2, 3), start=5)
    assert later == {position: image for position, image in expected.items() if position >= 5 * GLOBAL_SIZE}
