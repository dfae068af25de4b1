"""Ranks join, missing ranks are named, and what an earlier start left in the store is not taken for an answer."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_deeplab.distributed import rendezvous as module
from dist_deeplab.distributed.rendezvous import Rendezvous, rendezvous
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
    return together(*(lambda rank=rank: rendezvous(rank, world_size, timeout_s=timeout_s) for rank in ranks))


def test_all_ranks_share_one_store(address: dist.TCPStore) -> None:
    joined = join_all(3, 0, 1, 2)
    assert all(isinstance(each, Rendezvous) and each.members == joined[0].members for each in joined)  # type: ignore[attr-defined]
    stores = [each.store for each in joined]  # type: ignore[attr-defined]
    stores[1].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_two_ranks_that_hold_one_gpu_are_named_by_all(address: dist.TCPStore) -> None:
    """As when `srun --gpus-per-node=1 --ntasks-per-node=2` shows one GPU to both tasks."""
    gpus = ["GPU-a", "GPU-b", "GPU-a"]
    calls = [lambda rank=rank: rendezvous(rank, 3, timeout_s=10, gpu=gpus[rank]) for rank in range(3)]
    for error in together(*calls):
        assert isinstance(error, UserError)
        assert "ranks 0 and 2 hold the same GPU of " in str(error)


def test_a_restart_sees_nothing_of_an_earlier_start(address: dist.TCPStore) -> None:
    first = join_all(2, 0, 1)
    first[0].store.set("key", "stale")  # type: ignore[attr-defined]
    late = threading.Event()

    def rank_0() -> object:
        late.wait(10)  # rank 1 is back first, and finds the old name
        return rendezvous(0, 2, timeout_s=10)

    def rank_1() -> object:
        threading.Timer(0.5, late.set).start()
        return rendezvous(1, 2, timeout_s=10)

    for joined in together(rank_0, rank_1):
        assert not joined.store.check(["key"])  # type: ignore[attr-defined]


def test_ranks_that_do_not_join_are_named_by_all_others(address: dist.TCPStore) -> None:
    errors = join_all(5, 0, 2, 4, timeout_s=3)
    for error in errors:
        assert isinstance(error, UserError)
        assert "3 of 5 ranks joined at localhost:" in str(error)
        assert "missing: 1, 3;" in str(error)


def test_a_missing_rank_0_is_named(address: dist.TCPStore) -> None:
    (error,) = join_all(2, 1, timeout_s=1)
    assert "for rank 0, which did not join" in str(error)


def test_an_address_where_nothing_listens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(UserError, match=r"rank 1 on .* reached no process at localhost:1 in 1 s; .*GLOO_SOCKET_IFNAME"):
        rendezvous(1, 2, timeout_s=1)


def test_a_port_that_is_taken_is_named(address: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setattr(module.dist, "TCPStore", _taken)
    with pytest.raises(UserError, match=r"can't open localhost:.*address already in use.*MASTER_PORT"):
        rendezvous(0, 2, timeout_s=1)


def _taken(*arguments: object, **options: object) -> None:
    raise RuntimeError("The server socket has failed to listen: address already in use")
