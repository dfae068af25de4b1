"""The first failure of any rank is what all ranks name."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_deeplab.distributed.failure import OtherRankFailed, failure_published, read_failure
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def fail(rank: int, store: dist.Store | None, error: Exception) -> None:
    with failure_published(DistEnv(rank, rank, 3, "torchrun"), store):
        raise error


def test_a_broken_connection_names_the_rank_that_failed_first(store: dist.Store) -> None:
    assert read_failure(store) is None
    with pytest.raises(UserError, match="no data"):
        fail(1, store, UserError("no data\nhere"))
    with pytest.raises(OtherRankFailed, match=r"^rank 1 on .* failed: no data$"):
        fail(0, store, RuntimeError("Connection closed by peer"))
    first = read_failure(store)
    assert first is not None
    assert (first.rank, first.message) == (1, "no data")


def test_an_error_of_its_own_stays_its_own(store: dist.Store) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        fail(1, store, RuntimeError("out of memory"))
    with pytest.raises(UserError, match="no data here either"):
        fail(0, store, UserError("no data here either"))


def test_a_store_that_is_gone_or_none_changes_nothing() -> None:
    with pytest.raises(RuntimeError, match="odd"):
        fail(0, None, RuntimeError("odd"))
    limit = timedelta(seconds=2)
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit)
    client = dist.TCPStore("localhost", server.port, is_master=False, timeout=limit)
    del server
    with pytest.raises(RuntimeError, match="odd"):
        fail(0, client, RuntimeError("odd"))


def test_without_an_error_nothing_is_published(store: dist.Store) -> None:
    with failure_published(DistEnv(1, 1, 2, "torchrun"), store):
        pass
    assert read_failure(store) is None
