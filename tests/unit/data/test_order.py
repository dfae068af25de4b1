"""The order is a pure function of (seed, step), each epoch shows every sample once, and no split changes a sample."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.data.order import (
    BatchSplit,
    FullShuffle,
    hash_integers,
    permute,
    replacement_at,
    round_keys,
    uniforms,
)
from dist_deeplab.errors import UserError
from tests.unit.data import order_by_numpy as reference

MASK = 2**64 - 1
seeds = st.integers(0, 2**63 - 1)

SPLITMIX64_FIRST = 0xE220A8397B1DCDAF
"""The published first output of splitmix64 for seed 0."""
GOLDEN_FIRST = [0.6972785839011911, 0.6921428870302645, 0.44037625107470335, 0.04112249322585326]
GOLDEN_LATER = [0.6432172091017536, 0.11859922656606614, 0.5412027866637629, 0.873001297390587]
GOLDEN_ORDER_10 = [6, 8, 4, 9, 0, 1, 5, 3, 7, 2]
GOLDEN_ORDER_VOC = [2540, 3506, 1003, 4101, 8730]


def slow_mix(value: int) -> int:
    """splitmix64's finaliser in Python's own integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def slow_hash(*parts: int) -> int:
    state = 0
    for part in parts:
        state = slow_mix((state * 0x9E3779B97F4A7C15 + part + 0x9E3779B97F4A7C15) & MASK)
    return state


def epoch_of(size: int, seed: int, epoch: int) -> np.ndarray:
    """The samples of one whole epoch, in order."""
    order = FullShuffle(size, seed)
    return np.array([order.sample_at(position) for position in range(epoch * size, (epoch + 1) * size)], dtype=np.int64)


# --- hashes -----------------------------------------------------------------------------------------------------------


@given(parts=st.lists(st.integers(0, MASK), min_size=1, max_size=4))
def test_the_hash_equals_splitmix64_in_plain_integers(parts: list[int]) -> None:
    assert hash_integers(*parts) == slow_hash(*parts) == int(reference.hash_integers(*parts)[0])


@given(seed=seeds, position=st.integers(0, 2**62), count=st.integers(0, 8))
def test_uniforms_lie_in_0_to_1_and_a_longer_draw_begins_with_the_shorter(seed: int, position: int, count: int) -> None:
    draws = uniforms(seed, position, count)
    assert draws.dtype == np.float64
    assert draws.shape == (count,)
    assert ((draws >= 0) & (draws < 1)).all()
    assert (uniforms(seed, position, count + 1)[:count] == draws).all()


def test_the_largest_hash_still_gives_a_number_below_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_deeplab.data.order.hash_integers", lambda *parts: MASK)
    assert uniforms(0, 0, 1)[0] == 1 - 2**-53


def test_numbers_never_change_between_versions() -> None:
    """Recorded once. A change here means that every run, resumed or repeated, sees other pixels than before."""
    assert hash_integers(0) == SPLITMIX64_FIRST
    assert uniforms(0, 0, 4).tolist() == GOLDEN_FIRST
    assert uniforms(0, 123_456, 4).tolist() == GOLDEN_LATER
    assert epoch_of(10, 0, 0).tolist() == GOLDEN_ORDER_10
    assert [FullShuffle(10_582, 0).sample_at(p) for p in range(105_820, 105_825)] == GOLDEN_ORDER_VOC


@pytest.mark.quick("P1")
def test_another_process_computes_the_same_numbers() -> None:
    code = (
        "from dist_deeplab.data.order import FullShuffle, uniforms; order = FullShuffle(13, 7); "
        "print([order.sample_at(p) for p in range(40)], uniforms(7, 5, 3).tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    order = FullShuffle(13, 7)
    here = f"{[order.sample_at(p) for p in range(40)]} {uniforms(7, 5, 3).tolist()}\n"
    assert there == here


def test_the_draws_of_positions_are_spread_evenly() -> None:
    draws = np.array([uniforms(0, position, 4) for position in range(4000)])
    for column in draws.T:
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        chi_square = ((counts - 200) ** 2 / 200).sum()
        assert chi_square < 43.8, "19 degrees of freedom: exceeded once in 1000 by chance, and the numbers are fixed"
    correlation = np.corrcoef(np.vstack([draws.T, np.roll(draws, 1, axis=0).T]))
    assert np.abs(correlation - np.eye(8)).max() < 0.06, "draws are independent of each other and of their neighbours'"


def test_order_and_augmentation_share_no_number() -> None:
    order_hashes = {hash_integers(0, 0, epoch, round_) for epoch in range(1000) for round_ in range(8)}
    augmentation_hashes = {hash_integers(1, 0, position, draw) for position in range(1000) for draw in range(8)}
    assert len(order_hashes) == len(augmentation_hashes) == 8000
    assert not order_hashes & augmentation_hashes


# --- permutations -----------------------------------------------------------------------------------------------------


@pytest.mark.quick("P1")
@given(size=st.integers(1, 700), seed=seeds, epoch=st.integers(0, 10**6))
def test_every_epoch_shows_every_sample_exactly_once(size: int, seed: int, epoch: int) -> None:
    samples = epoch_of(size, seed, epoch)
    assert samples.dtype == np.int64
    assert sorted(samples.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1023, 1025, 1464, 4096, 10_582])
def test_every_epoch_is_a_permutation_around_powers_of_two_too(size: int) -> None:
    for epoch in (0, 1):
        assert (np.sort(epoch_of(size, 0, epoch)) == np.arange(size)).all()


@pytest.mark.quick("P10")
@pytest.mark.parametrize("size", [10**6 + 3, 10**9, 2**31, 2**40 + 1])
def test_huge_sets_are_permuted_without_a_list(size: int) -> None:
    rng = np.random.default_rng(0)
    index = np.unique(np.concatenate([np.arange(1000), size - 1 - np.arange(1000), rng.integers(0, size, 3000)]))
    samples = np.array([permute(int(i), size=size, keys=round_keys(0, 5, 3)) for i in index])
    assert samples.min() >= 0
    assert samples.max() < size
    assert len(np.unique(samples)) == len(index)
    assert abs(samples.mean() / size - 0.5) < 0.05


@given(size=st.integers(8, 300), seed=seeds, epoch=st.integers(0, 1000))
def test_epochs_and_seeds_have_orders_of_their_own(size: int, seed: int, epoch: int) -> None:
    this = epoch_of(size, seed, epoch).tolist()
    assert this != list(range(size))
    assert this != epoch_of(size, seed, epoch + 1).tolist()
    assert this != epoch_of(size, seed + 1, epoch).tolist()


def test_every_sample_is_equally_often_at_every_place() -> None:
    size, epochs = 10, 4000
    orders = reference.samples_at(np.arange(size * epochs), num_samples=size, seed=0).reshape(epochs, size)
    counts = np.array([np.bincount(place, minlength=size) for place in orders.T])
    chi_square = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi_square < 126.1, "81 degrees of freedom: exceeded once in 1000 by chance, and the numbers are fixed"


def test_all_orders_of_a_tiny_set_occur() -> None:
    orders = reference.samples_at(np.arange(3 * 2000), num_samples=3, seed=1).reshape(2000, 3)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert counts.min() > 2000 / 6 * 0.8


def test_a_batch_may_straddle_two_epochs() -> None:
    split = BatchSplit.derive(global_size=4, micro_size=None, world_size=1)
    order = FullShuffle(6, 0)
    stream = np.array([order.sample_at(p) for step in range(3) for p in split.positions(step, 0)[0]])
    assert sorted(stream[:6]) == sorted(stream[6:]) == list(range(6))
    assert (stream[:6] != stream[6:]).any()


# --- splits -----------------------------------------------------------------------------------------------------------


@st.composite
def splits(draw: st.DrawFn) -> BatchSplit:
    world_size = draw(st.integers(1, 12))
    global_size = draw(st.integers(world_size, 100))
    micro_size = draw(st.none() | st.integers(1, 5) | st.integers(1, 120))
    return BatchSplit(global_size, micro_size or -(-global_size // world_size), world_size, draw(st.booleans()))


def parts_of(split: BatchSplit, step: int) -> list[list[int]]:
    """All ranks' micro-batches of a step: the ranks' first ones, their second ones, and so on."""
    ranks = [split.positions(step, rank) for rank in range(split.world_size)]
    assert {len(micro_batches) for micro_batches in ranks} == {split.accumulation}, "else ranks would wait for ever"
    return [ranks[r][a].tolist() for a in range(split.accumulation) for r in range(split.world_size)]


@pytest.mark.quick("P1")
@given(split=splits(), step=st.integers(0, 10**9))
def test_positions_equal_cutting_the_step_into_equal_parts_dealt_to_the_ranks_in_turns_or_rank_by_rank(
    split: BatchSplit, step: int
) -> None:
    everything = np.arange(step * split.global_size, (step + 1) * split.global_size)
    expected = np.array_split(everything, split.accumulation * split.world_size)  # the first ones get the rest
    if split.contiguous:
        found = [p for rank in range(split.world_size) for part in split.positions(step, rank) for p in part.tolist()]
        assert found == everything.tolist(), "rank after rank, micro-batch after micro-batch"
    else:
        assert parts_of(split, step) == [part.tolist() for part in expected]
    assert {part.dtype for part in split.positions(step, 0)} == {np.dtype("int64")}


@given(split=splits())
def test_parts_and_ranks_differ_by_one_image_at_most_and_none_is_above_the_micro_size(split: BatchSplit) -> None:
    sizes = [split.sizes(rank) for rank in range(split.world_size)]
    assert sizes == [[len(part) for part in split.positions(3, rank)] for rank in range(split.world_size)]
    parts = [size for own in sizes for size in own]
    ranks = [sum(own) for own in sizes]
    assert max(parts) - min(parts) <= 1
    assert max(ranks) - min(ranks) <= 1
    assert max(parts) == split.largest <= split.micro_size
    assert split.is_even == (max(parts) == min(parts))
    assert split.has_empty_parts == (min(parts) == 0)
    assert min(parts) > 0 or split.micro_size == 1, "what the advice to use a micro_size of 2 relies on"


@given(split=splits())
def test_no_smaller_accumulation_would_keep_the_micro_size(split: BatchSplit) -> None:
    fewer = split.world_size * (split.accumulation - 1)
    assert fewer * split.micro_size < split.global_size


@given(split=splits())
def test_every_micro_size_does_what_the_next_lower_of_the_list_does(split: BatchSplit) -> None:
    assert split.micro_sizes[0] == -(-split.global_size // split.world_size)
    assert split.micro_sizes[-1] == 1
    assert split.largest == max(size for size in split.micro_sizes if size <= split.micro_size)


@given(world_size=st.integers(1, 6), micro_size=st.integers(1, 6), accumulation=st.integers(1, 6))
def test_sizes_that_divide_are_cut_evenly(world_size: int, micro_size: int, accumulation: int) -> None:
    global_size = world_size * micro_size * accumulation
    split = BatchSplit.derive(global_size=global_size, micro_size=micro_size, world_size=world_size)
    assert split.is_even
    assert split.accumulation == accumulation
    positions = np.arange(global_size).reshape(accumulation, world_size, micro_size)
    for rank in range(world_size):
        assert np.stack(split.positions(0, rank)).tolist() == positions[:, rank].tolist()


def test_only_more_ranks_than_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"global_size=3 .* 8 processes; use batch\.global_size=8 .* 3 processes"):
        BatchSplit.derive(global_size=3, micro_size=None, world_size=8)
    with pytest.raises(UserError, match=r"at most 1 process$"):
        BatchSplit.derive(global_size=1, micro_size=None, world_size=2)


def test_a_split_says_its_arithmetic() -> None:
    assert str(BatchSplit.derive(global_size=1, micro_size=None, world_size=1)) == (
        "1 image a step = 1 rank x 1 image x 1 accumulated micro-batch"
    )
    assert str(BatchSplit.derive(global_size=12, micro_size=2, world_size=3)) == (
        "12 images a step = 3 ranks x 2 images x 2 accumulated micro-batches"
    )
    assert str(BatchSplit.derive(global_size=10, micro_size=None, world_size=3)) == (
        "10 images a step = 3 ranks x up to 4 images x 1 accumulated micro-batch (uneven: ranks wait for others, "
        "some 17% of the time)"
    )


@given(
    position=st.integers(0, 2**62), size=st.integers(1, 2**40), seed=st.integers(0, 2**63 - 1), count=st.integers(1, 6)
)
def test_the_order_and_the_draws_equal_those_of_numpy(position: int, size: int, seed: int, count: int) -> None:
    expected = reference.samples_at(np.array([position]), num_samples=size, seed=seed)[0]
    assert FullShuffle(size, seed).sample_at(position) == expected
    bits = reference.hash_integers(1, seed, position, np.arange(count)) >> np.uint64(11)
    assert uniforms(seed, position, count).tolist() == (bits.astype(np.float64) * 2.0**-53).tolist()


@given(position=st.integers(0, 2**62), size=st.integers(1, 50))
def test_replacements_are_samples_and_differ_from_attempt_to_attempt(position: int, size: int) -> None:
    found = [replacement_at(position, attempt, num_samples=size, seed=1) for attempt in range(1, 200)]
    assert set(found) <= set(range(size))
    assert len(set(found)) > size // 2


def test_runs_of_other_seeds_replace_bad_samples_by_others() -> None:
    def chosen(seed: int) -> list[int]:
        return [replacement_at(position, 1, num_samples=10_000, seed=seed) for position in range(50)]

    assert chosen(1) == chosen(1)
    assert len(set(chosen(1)) & set(chosen(2))) < 5
