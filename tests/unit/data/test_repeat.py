"""data.repeat_threshold: LVIS' repeat factors, and an order with them that keeps P1."""

import math
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.config import load_config
from dist_deeplab.data.order import FullShuffle, hash_each, hash_integers
from dist_deeplab.data.repeat import RepeatShuffle, repeat_factors
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.data.shards.presence import read_presence
from dist_deeplab.errors import UserError
from tests.unit.data.pixels import assert_the_same_for_any_split_worker_count_and_start

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

seeds = st.integers(0, 2**63 - 1)


@st.composite
def shuffles(draw: st.DrawFn) -> RepeatShuffle:
    factors = st.floats(1, 6) | st.sampled_from([1.0, 1.5, 2.0, 3.0])
    return RepeatShuffle(np.array(draw(st.lists(factors, min_size=1, max_size=30))), seed=draw(seeds))


def factors_of(shuffle: RepeatShuffle) -> list[Fraction]:
    """The factors that an order keeps to, exactly."""
    pairs = zip(shuffle._whole.tolist(), shuffle._fraction.tolist(), strict=True)
    return [whole + Fraction(fraction, 2**32) for whole, fraction in pairs]


def copies_before(shuffle: RepeatShuffle, epoch: int) -> list[int]:
    """How often each sample has come before an epoch, by exact arithmetic."""
    counts = []
    for index, factor in enumerate(factors_of(shuffle)):
        phase = Fraction(hash_integers(5, shuffle.seed, index) >> 32, 2**32)
        counts.append(math.floor(epoch * factor + phase))
    return counts


def epoch_of(shuffle: RepeatShuffle, epoch: int) -> list[int]:
    begin, end = sum(copies_before(shuffle, epoch)), sum(copies_before(shuffle, epoch + 1))
    return [shuffle.sample_at(position) for position in range(begin, end)]


# --- factors ----------------------------------------------------------------------------------------------------------


@given(
    there=st.integers(1, 20).flatmap(
        lambda classes: st.lists(st.lists(st.booleans(), min_size=classes, max_size=classes), min_size=1, max_size=25)
    ),
    threshold=st.floats(1e-6, 1),
)
def test_factors_are_those_of_the_paper(there: list[list[bool]], threshold: float) -> None:
    """By loops, as the paper's section says it."""
    num_classes = len(there[0])
    classes = []
    for number in range(num_classes):
        share = sum(row[number] for row in there) / len(there)
        classes.append(max(1.0, math.sqrt(threshold / share)) if share else 1.0)
    samples = [max([classes[number] for number in range(num_classes) if row[number]], default=1.0) for row in there]
    found = repeat_factors(
        np.packbits(np.array(there), axis=1, bitorder="little"), num_classes=num_classes, threshold=threshold
    )
    assert found.images.tolist() == [sum(row[number] for row in there) for number in range(num_classes)]
    assert found.classes.tolist() == classes
    assert found.samples.tolist() == samples


def test_factors_do_not_depend_on_how_many_samples_are_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    presence = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    expected = repeat_factors(presence, num_classes=21, threshold=0.9)
    monkeypatch.setattr("dist_deeplab.data.repeat._ROWS", 7)
    found = repeat_factors(presence, num_classes=21, threshold=0.9)
    assert expected.classes.max() > 1
    assert found.samples.tolist() == expected.samples.tolist()
    assert found.classes.tolist() == expected.classes.tolist()


def test_the_effect_is_said_in_a_sentence() -> None:
    presence = np.array([[1], [1], [1], [3]], np.uint8)
    factors = repeat_factors(presence, num_classes=3, threshold=1.0)
    assert factors.describe(["road", "sign", "tram"]) == ("4 images come some 5 times in an epoch, those of sign x2")


# --- P1 ---------------------------------------------------------------------------------------------------------------


@given(shuffle=shuffles(), epoch=st.integers(0, 10**6))
def test_every_epoch_shows_every_sample_as_often_as_its_factor_rounded(shuffle: RepeatShuffle, epoch: int) -> None:
    expected = np.subtract(copies_before(shuffle, epoch + 1), copies_before(shuffle, epoch)).tolist()
    samples = epoch_of(shuffle, epoch)
    assert np.bincount(samples, minlength=shuffle.num_samples).tolist() == expected
    for count, factor in zip(expected, factors_of(shuffle), strict=True):
        assert count in (math.floor(factor), math.ceil(factor))


@given(shuffle=shuffles(), positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_a_position_shows_the_same_sample_whatever_was_asked_before(
    shuffle: RepeatShuffle, positions: list[int]
) -> None:
    expected = [pickle.loads(pickle.dumps(shuffle)).sample_at(position) for position in positions]
    assert [shuffle.sample_at(position) for position in positions] == expected
    assert [shuffle.sample_at(position) for position in reversed(positions)] == expected[::-1]
    assert [shuffle.sample_at(np.int64(position)) for position in positions] == expected  # type: ignore[arg-type]


@given(size=st.integers(1, 40), seed=seeds, position=st.integers(0, 10**9))
def test_where_nothing_is_repeated_the_order_is_that_without_factors(size: int, seed: int, position: int) -> None:
    assert RepeatShuffle(np.ones(size), seed=seed).sample_at(position) == FullShuffle(size, seed).sample_at(position)


def test_samples_come_as_often_as_their_factors_say() -> None:
    """Within 1 over any number of epochs, and in each epoch half of those with a factor of 1.5."""
    factors = np.repeat([1.0, 1.25, 1.5, 4.75], 200)
    shuffle = RepeatShuffle(factors, seed=3)
    counts = np.zeros(800)
    extras = []
    for epoch in range(20):
        shown = np.bincount(epoch_of(shuffle, epoch), minlength=800)
        counts += shown
        assert np.abs(counts - (epoch + 1) * factors).max() <= 1
        extras.append((shown - np.floor(factors)).reshape(4, 200).mean(axis=1))
    assert np.abs(np.array(extras) - [0, 0.25, 0.5, 0.75]).max() < 0.12, "four standard deviations of 200 draws"
    assert np.ptp(np.array(extras), axis=0)[1:].min() > 0.01, "epochs differ in length"


def test_numbers_never_change_between_versions() -> None:
    """Recorded once. A change here means that a resumed run sees other samples than it would have."""
    shuffle = RepeatShuffle(np.array([1.0, 1.5, 2.25, 1.0, math.sqrt(10)]), seed=7)
    assert [shuffle.sample_at(p) for p in range(20)] == GOLDEN_FIRST
    assert [shuffle.sample_at(p) for p in range(10**6, 10**6 + 20)] == GOLDEN_LATER


GOLDEN_FIRST = [2, 4, 4, 1, 2, 3, 4, 1, 0, 3, 0, 4, 4, 4, 1, 2, 4, 2, 4, 2]
GOLDEN_LATER = [4, 4, 2, 3, 4, 4, 0, 2, 4, 2, 1, 1, 3, 1, 2, 4, 2, 4, 2, 0]


def test_another_process_computes_the_same_numbers() -> None:
    code = (
        "import numpy as np; from dist_deeplab.data.repeat import RepeatShuffle; "
        "order = RepeatShuffle(np.linspace(1, 4, 13), seed=7); print([order.sample_at(p) for p in range(900, 990)])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    order = RepeatShuffle(np.linspace(1, 4, 13), seed=7)
    assert there == f"{[order.sample_at(p) for p in range(900, 990)]}\n"


@given(seed=seeds, epoch=st.integers(0, 1000))
def test_epochs_and_seeds_have_orders_of_their_own(seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_of(RepeatShuffle(np.linspace(1, 3, 40), seed=seed), epoch)

    assert order(seed, epoch) != order(seed, epoch + 1)
    assert order(seed, epoch) != order(seed + 1, epoch)
    assert order(seed, epoch) != sorted(order(seed, epoch))


@given(parts=st.lists(seeds, min_size=1, max_size=3), numbers=st.lists(st.integers(0, 2**63 - 1), max_size=5))
def test_hashes_of_many_numbers_are_those_of_each(parts: list[int], numbers: list[int]) -> None:
    found = hash_each(np.array(numbers, dtype=np.int64), *parts)
    assert found.tolist() == [hash_integers(*parts, number) for number in numbers]


def test_memory_and_reach_of_a_large_set() -> None:
    """10**6 samples: a position far into the run at once; 12 bytes per sample, and 4 in each of two epochs."""
    shuffle = RepeatShuffle(np.linspace(1, 3, 10**6), seed=0)
    for position in (0, 10**12 + 7, 2 * 10**6, 4 * 10**6):
        assert 0 <= shuffle.sample_at(position) < 10**6
    kept = [shuffle._whole, shuffle._fraction, shuffle._phase, *(epoch.ends for epoch in shuffle._epochs.values())]
    assert sum(array.nbytes for array in kept) == (12 + 2 * 4) * 10**6


# --- in the loader ----------------------------------------------------------------------------------------------------


def test_pixels_are_the_same_for_any_split_worker_count_and_start(shard_set: Manifest) -> None:
    factors = repeat_factors(read_presence(shard_set), num_classes=21, threshold=0.9).samples
    assert factors.max() > 1
    assert_the_same_for_any_split_worker_count_and_start(shard_set, RepeatShuffle(factors, seed=5), contiguous=False)


@pytest.mark.parametrize("other", ["data.shuffle=blocks", "data.access=stream"])
def test_other_orders_are_refused_in_a_sentence(other: str) -> None:
    assert load_config(None, ["data.repeat_threshold=0.1"]).data.repeat_threshold == 0.1
    assert load_config(None, [other]).data.repeat_threshold == 0
    with pytest.raises(UserError, match=r"data\.repeat_threshold needs data\.access=indexed and data\.shuffle=full"):
        load_config(None, ["data.repeat_threshold=0.1", other])
