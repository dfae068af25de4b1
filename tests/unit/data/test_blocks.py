"""data.shuffle=blocks keeps P1: exactly once per epoch, a pure function of the position; and it reads few shards."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.config import load_config
from dist_deeplab.data.blocks import BlockShuffle
from dist_deeplab.data.loader import StepSampler, TrainDataset, TrainLoader
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.errors import UserError
from tests.unit.data.pixels import AUGMENTATION, GLOBAL_SIZE, assert_the_same_for_any_split_worker_count_and_start

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@st.composite
def shuffles(draw: st.DrawFn) -> BlockShuffle:
    """Any sizes of shards (some empty), windows and groups, dividing nothing."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any))
    return BlockShuffle(
        sizes,
        seed=draw(st.integers(0, 2**63 - 1)),
        window_shards=draw(st.integers(1, 5)),
        groups=draw(st.integers(1, 9)),
        global_size=draw(st.integers(1, 30)),
    )


def shards_of(shuffle: BlockShuffle, positions: np.ndarray) -> list[int]:
    ends = np.cumsum(shuffle.shard_sizes)
    return [int(np.searchsorted(ends, shuffle.sample_at(position), side="right")) for position in positions]


# --- P1 ---------------------------------------------------------------------------------------------------------------


@given(shuffle=shuffles(), epoch=st.integers(0, 10**6))
def test_every_epoch_shows_every_sample_exactly_once(shuffle: BlockShuffle, epoch: int) -> None:
    size = shuffle.num_samples
    samples = [shuffle.sample_at(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert sorted(samples) == list(range(size))


@given(shuffle=shuffles(), positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_a_position_shows_the_same_sample_whatever_was_asked_before(
    shuffle: BlockShuffle, positions: list[int]
) -> None:
    expected = [pickle.loads(pickle.dumps(shuffle)).sample_at(position) for position in positions]
    assert [shuffle.sample_at(position) for position in positions] == expected
    assert [shuffle.sample_at(position) for position in reversed(positions)] == expected[::-1]


def test_numbers_never_change_between_versions() -> None:
    """Recorded once. A change here means that a resumed run sees other samples than it would have."""
    shuffle = BlockShuffle([5, 4, 0, 7, 3, 6, 5], seed=7, window_shards=2, groups=2, global_size=6)
    assert [shuffle.sample_at(p) for p in range(30)] == GOLDEN_EPOCH_0
    assert [shuffle.sample_at(p) for p in range(3000, 3030)] == GOLDEN_EPOCH_100


# fmt: off
GOLDEN_EPOCH_0 = [
    19,
    2,
    1,
    10,
    13,
    16,
    20,
    4,
    3,
    15,
    18,
    14,
    21,
    22,
    23,
    9,
    12,
    11,
    24,
    0,
    6,
    17,
    28,
    25,
    8,
    7,
    5,
    27,
    29,
    26,
]
GOLDEN_EPOCH_100 = [
    17,
    12,
    9,
    1,
    3,
    2,
    14,
    18,
    15,
    4,
    0,
    8,
    10,
    13,
    16,
    19,
    5,
    7,
    11,
    29,
    27,
    22,
    20,
    24,
    28,
    26,
    25,
    6,
    21,
    23,
]
# fmt: on


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        shuffle = BlockShuffle([10] * 12, seed=seed, window_shards=3, groups=2, global_size=8)
        return [shuffle.sample_at(position) for position in range(epoch * 120, (epoch + 1) * 120)]

    assert order(seed, epoch) != order(seed, epoch + 1)
    assert order(seed, epoch) != order(seed + 1, epoch)
    assert order(seed, epoch) != sorted(order(seed, epoch))


def test_every_sample_is_about_equally_often_at_every_place() -> None:
    shuffle = BlockShuffle([2] * 5, seed=0, window_shards=2, groups=1, global_size=2)
    epochs = 3000
    orders = np.array([shuffle.sample_at(p) for p in range(10 * epochs)]).reshape(epochs, 10)
    counts = np.array([np.bincount(place, minlength=10) for place in orders.T]) / epochs
    assert np.abs(counts - 0.1).max() < 0.03, "shards change places, and samples inside windows"


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize(("global_size", "micro_size"), [(32, None), (32, 1), (64, 3)])
def test_a_node_reads_its_share_of_the_shards_alone(nodes: int, global_size: int, micro_size: int | None) -> None:
    """200 shards, 2 ranks on each node: in an epoch 1/nodes of the shards, and one that two nodes share."""
    shuffle = BlockShuffle([20] * 200, seed=3, window_shards=4, groups=8, global_size=global_size)
    split = BatchSplit.derive(global_size=global_size, micro_size=micro_size, world_size=2 * nodes, contiguous=True)
    steps = range(4000 // global_size)
    for node in range(nodes):
        ranks = (2 * node, 2 * node + 1)
        positions = np.concatenate([part for s in steps for rank in ranks for part in split.positions(s, rank)])
        read = set(shards_of(shuffle, positions))
        assert len(read) <= 200 / nodes * 1.1
        assert len(read) >= 200 / nodes * 0.95


@given(shuffle=shuffles(), epoch=st.integers(0, 5))
def test_a_group_is_inside_one_window_at_a_time(shuffle: BlockShuffle, epoch: int) -> None:
    """So that as many shards as a window has need to be open: each window's are used in one stretch."""
    size = shuffle.num_samples
    positions = np.arange(epoch * size, (epoch + 1) * size)
    groups = positions % shuffle.global_size * shuffle.groups // shuffle.global_size
    for group in range(shuffle.groups):
        used = shards_of(shuffle, positions[groups == group])
        first, last = {}, {}
        for time, shard in enumerate(used):
            first.setdefault(shard, time)
            last[shard] = time
        for time in range(len(used)):
            assert sum(first[shard] <= time <= last[shard] for shard in first) <= shuffle.window_shards


@given(shuffle=shuffles(), epoch=st.integers(0, 10**6))
def test_a_group_has_as_many_samples_of_an_epoch_as_places_in_its_steps(shuffle: BlockShuffle, epoch: int) -> None:
    size = shuffle.num_samples
    positions = np.arange(epoch * size, (epoch + 1) * size)
    groups = positions % shuffle.global_size * shuffle.groups // shuffle.global_size
    begins = shuffle._epoch(epoch).begins
    assert np.diff(begins).tolist() == np.bincount(groups, minlength=shuffle.groups).tolist()


def test_memory_and_time_of_a_large_set() -> None:
    """10**8 samples in 10**5 shards: a position far into the run at once, 16 bytes per shard kept."""
    shuffle = BlockShuffle([1000] * 100_000, seed=0, window_shards=4, groups=16, global_size=1024)
    assert 0 <= shuffle.sample_at(10**12 + 7) < 10**8
    (epoch,) = shuffle._epochs.values()
    assert len(epoch.shards) * epoch.shards.itemsize + len(epoch.ends) * epoch.ends.itemsize == 16 * 100_000
    for position in (0, 10**8, 5 * 10**8):
        shuffle.sample_at(position)
    assert len(shuffle._epochs) == 2


# --- in the loader ----------------------------------------------------------------------------------------------------


def test_pixels_are_the_same_for_any_split_worker_count_and_start(shard_set: Manifest) -> None:
    sizes = [shard.num_samples for shard in shard_set.shards]
    order = BlockShuffle(sizes, seed=5, window_shards=1, groups=2, global_size=GLOBAL_SIZE)
    assert_the_same_for_any_split_worker_count_and_start(shard_set, order, contiguous=True)


def test_a_reader_keeps_open_what_its_groups_need(shard_set: Manifest) -> None:
    order = BlockShuffle([3, 3, 2], seed=5, window_shards=2, groups=8, global_size=16)
    dataset = TrainDataset(shard_set, num_classes=21, augmentation=AUGMENTATION, seed=5, sample_order=order)
    for world_size, expected in ((1, 16), (2, 8), (8, 2), (16, 2)):
        split = BatchSplit.derive(global_size=16, micro_size=1, world_size=world_size, contiguous=True)
        TrainLoader(dataset, StepSampler(0, 1, split=split, rank=0), num_workers=0, pin_memory=False)
        assert dataset.reader.max_open == expected
    assert order.cached_shards(1) == 3, "no more than there are"
    assert BlockShuffle([3] * 1000, seed=5, window_shards=2, groups=8, global_size=16).cached_shards(4) == 2 * 3 * 2
    assert BlockShuffle([3] * 1000, seed=5, window_shards=2, groups=8, global_size=16).cached_shards(3) == 3 * 3 * 2


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_shards_are_fetched_ahead_by_the_steps_in_which_each_group_moves_by_a_window(groups: int) -> None:
    order = BlockShuffle([3] * 64, seed=1, window_shards=2, groups=groups, global_size=8)
    samples_of_a_window, of_a_group_per_step = 2 * 3, 8 // groups
    assert order.steps_ahead == max(1, samples_of_a_window // of_a_group_per_step)


def test_more_groups_than_images_of_a_step_are_as_good_as_that_many() -> None:
    order, same = (
        BlockShuffle([3] * 64, seed=1, window_shards=2, groups=groups, global_size=8) for groups in (1000, 8)
    )
    assert [order.sample_at(p) for p in range(400)] == [same.sample_at(p) for p in range(400)]
    assert order.cached_shards(2) == same.cached_shards(2)


def test_blocks_and_stream_are_not_combined() -> None:
    assert load_config(None, ["data.shuffle=blocks", "data.window_shards=2"]).data.canonical_groups == 16
    with pytest.raises(UserError, match=r"data\.access=stream has a shuffle of its own"):
        load_config(None, ["data.shuffle=blocks", "data.access=stream"])
