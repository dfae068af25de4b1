"""Ranks meet, ranks that miss are named, and what an earlier start left in the store is not taken for an answer."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_deeplab.distributed import rendezvous
from dist_deeplab.distributed.rendezvous import meet
from dist_deeplab.errors import UserError


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A store that outlives the ranks, as torchrun's does, and the environment that leads there."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def together(*calls: Callable[[], object]) -> list[object]:
    """Run the calls in threads; return what each returned or raised."""
    results: list[object] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def join_all(world_size: int, *ranks: int, timeout_s: float = 10) -> list[object]:
    return together(*(lambda rank=rank: meet(rank, world_size, timeout_s=timeout_s) for rank in ranks))


def test_all_ranks_share_one_store(address: dist.TCPStore) -> None:
    stores = join_all(3, 0, 1, 2)
    stores[1].set("key", "value")  # type: ignore[attr-defined]
    assert [store.get("key") for store in stores] == [b"value"] * 3  # type: ignore[attr-defined]


def test_a_restart_sees_nothing_of_an_earlier_start(address: dist.TCPStore) -> None:
    first = join_all(2, 0, 1)
    first[0].set("key", "stale")  # type: ignore[attr-defined]
    late = threading.Event()

    def rank_0() -> object:
        late.wait(10)  # rank 1 is back first, and finds the old meeting
        return meet(0, 2, timeout_s=10)

    def rank_1() -> object:
        threading.Timer(0.5, late.set).start()
        return meet(1, 2, timeout_s=10)

    for store in together(rank_0, rank_1):
        assert not store.check(["key"])  # type: ignore[attr-defined]


def test_ranks_that_do_not_come_are_named_by_all_others(address: dist.TCPStore) -> None:
    errors = join_all(5, 0, 2, 4, timeout_s=1)
    for error in errors:
        assert isinstance(error, UserError)
        assert "3 of 5 ranks met at localhost:" in str(error)
        assert "missing: 1, 3;" in str(error)


def test_a_missing_rank_0_is_named(address: dist.TCPStore) -> None:
    (error,) = join_all(2, 1, timeout_s=1)
    assert "for rank 0, which did not come" in str(error)


def test_an_address_where_nobody_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(UserError, match=r"rank 1 on .* reached nobody at localhost:1 in 1 s; .*GLOO_SOCKET_IFNAME"):
        meet(1, 2, timeout_s=1)


def test_a_port_that_is_taken_is_named(address: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setattr(rendezvous.dist, "TCPStore", _taken)
    with pytest.raises(UserError, match=r"can't open localhost:.*address already in use.*MASTER_PORT"):
        meet(0, 2, timeout_s=1)


def _taken(*arguments: object, **options: object) -> None:
    raise RuntimeError("The server socket has failed to listen: address already in use")
