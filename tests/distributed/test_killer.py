"""A round of the random killer; `python tests/distributed/killer.py --rounds 50` plays many."""

import random
from pathlib import Path

import pytest

from tests.distributed.killer import compare, draw_faults, play_round, undisturbed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RANKS = 4  # with two ranks there is one order of summation only; DDP's buckets matter from three on


@pytest.fixture(scope="module")
def reference(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(sample_shards, tmp_path_factory.mktemp("runs"), ranks=RANKS)


@pytest.mark.parametrize("seed", [5])  # three faults: a rank, a warning, rank 0 during an evaluation
def test_a_run_killed_at_random_ends_with_the_undisturbed_weights_and_curves(
    reference: Path, sample_shards: Path, tmp_path: Path, seed: int
) -> None:
    faults = draw_faults(random.Random(seed), ranks=RANKS, hangs=False)
    print(*faults, sep="\n")
    play_round(sample_shards, tmp_path, "run", faults, ranks=RANKS)
    compare(tmp_path / "run", reference)
