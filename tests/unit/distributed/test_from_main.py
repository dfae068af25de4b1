"""What the main rank reads arrives on all ranks as it is, and its error too; nobody else reads."""

import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_deeplab.distributed import from_main
from dist_deeplab.distributed.from_main import load_on_main, wait_for_main
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from tests.distributed.forked_ranks import forks


def content() -> dict[str, Any]:
    """Of the kinds that a checkpoint holds, and tensors with gaps."""
    numbers = torch.arange(120, dtype=torch.float32)
    return {
        "model": {
            "conv": numbers.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "half": numbers.bfloat16().view(5, 24).t(),
            "count": torch.tensor(7),
            "empty": torch.zeros(0, 3),
            "flags": torch.tensor([True, False]),
            "gaps": numbers.view(12, 10)[:, ::3],
            "repeated": torch.ones(1, 3).expand(4, 3),
            "nan": torch.tensor([float("nan"), -0.0], dtype=torch.float64),
        },
        "state": {0: {"momentum": numbers[:3]}, 5: [None, True, 2.5, float("inf"), "text", ("a", 1, ())]},
    }


def refuse() -> None:
    raise UserError("no such thing; look elsewhere")


def nothing() -> None:
    return None


def report_late() -> None:
    time.sleep(0.2)
    print("all is well")


LOADS: tuple[Callable[[], Any], ...] = (content, refuse, nothing)
Outcome = tuple[Any, str, int]


def run_rank(rank: int, folder: Path) -> None:
    """One rank: for each of LOADS the result or the error, and how often this rank called it; what was said by then."""
    world = 3
    store, timeout = dist.FileStore(str(folder / "store"), world), datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    from_main._GROUP_BYTES = 100  # a tensor may take several groups, a group hold several tensors
    outcomes = []
    for load in LOADS:
        calls = []

        def counted(load: Callable[[], Any] = load, calls: list[None] = calls) -> Any:
            calls.append(None)
            time.sleep(0.2)  # the others are there first
            return load()

        try:
            found: Any = load_on_main(DistEnv(rank, rank, world, "torchrun", "cpu"), counted)
            outcomes.append((found, "", len(calls)))
        except UserError as error:
            outcomes.append((None, str(error), len(calls)))
    with (folder / "said").open("a") as sys.stdout:
        wait_for_main(DistEnv(rank, rank, world, "torchrun", "cpu"), report_late)
        said = (folder / "said").read_text()
    torch.save((outcomes, said), folder / f"rank_{rank}")
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Outcome], str]]:
    """Per rank what `run_rank` saved."""
    folder, context = tmp_path_factory.mktemp("ranks"), forks()
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    return [torch.load(folder / f"rank_{rank}", weights_only=True) for rank in range(3)]


@pytest.fixture
def outcomes(ranks: list[tuple[list[Outcome], str]]) -> list[list[Outcome]]:
    """Per rank the outcome of each of LOADS."""
    return [outcomes for outcomes, _ in ranks]


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
        assert torch.equal(*bits)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_all_ranks_have_what_the_main_one_read(outcomes: list[list[Outcome]]) -> None:
    results = [rank[LOADS.index(content)] for rank in outcomes]
    assert [calls for _, _, calls in results] == [1, 0, 0]
    for found, _, _ in results:
        assert_same(found, content())
    assert results[2][0]["model"]["conv"].is_contiguous(memory_format=torch.channels_last)


def test_an_error_of_the_main_rank_is_one_of_all(outcomes: list[list[Outcome]]) -> None:
    results = [rank[LOADS.index(refuse)] for rank in outcomes]
    assert results == [(None, "no such thing; look elsewhere", number) for number in (1, 0, 0)]


def test_nothing_is_a_result_too(outcomes: list[list[Outcome]]) -> None:
    assert [rank[LOADS.index(nothing)] for rank in outcomes] == [(None, "", number) for number in (1, 0, 0)]


def test_no_rank_leaves_before_the_main_one_has_said_what_it_has_to_say(ranks: list[tuple[list[Outcome], str]]) -> None:
    assert [said for _, said in ranks] == ["all is well\n"] * 3


def test_a_single_process_just_reads() -> None:
    own = content()
    assert load_on_main(DistEnv(), lambda: own) is own
