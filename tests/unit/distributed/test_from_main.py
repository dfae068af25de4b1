"""What the main rank reads arrives on all ranks as it is, and its error too; nobody else reads."""

import datetime
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_deeplab.distributed import from_main
from dist_deeplab.distributed.from_main import load_on_main
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError


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


def run_rank(rank: int, store: Path, load: Callable[[], Any], pipe: Any) -> None:
    """One rank: the result or the error, and how often this rank called `load`."""
    world, calls = 3, 0
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world, timeout=timeout
    )

    def counted() -> Any:
        nonlocal calls
        calls += 1
        time.sleep(0.2)  # the others are there first
        return load()

    try:
        found: Any = load_on_main(DistEnv(rank, rank, world, "torchrun", "cpu"), counted)
        torch.save((found, "", calls), pipe)
    except UserError as error:
        torch.save((None, str(error), calls), pipe)
    os._exit(0)


def on_three_ranks(load: Callable[[], Any], folder: Path) -> list[tuple[Any, str, int]]:
    context = multiprocessing.get_context("fork")
    files = [folder / f"rank_{rank}" for rank in range(3)]
    ranks = [
        context.Process(target=run_rank, args=(rank, folder / "store", load, file)) for rank, file in enumerate(files)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [torch.load(file, weights_only=True) for file in files]


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


def test_all_ranks_have_what_the_main_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        from_main, "_GROUP_BYTES", 100
    )  # a tensor may take several groups, a group hold several tensors
    results = on_three_ranks(content, tmp_path)
    assert [calls for _, _, calls in results] == [1, 0, 0]
    for found, _, _ in results:
        assert_same(found, content())
    assert results[2][0]["model"]["conv"].is_contiguous(memory_format=torch.channels_last)


def test_an_error_of_the_main_rank_is_one_of_all(tmp_path: Path) -> None:
    results = on_three_ranks(refuse, tmp_path)
    assert results == [(None, "no such thing; look elsewhere", number) for number in (1, 0, 0)]


def test_nothing_is_a_result_too(tmp_path: Path) -> None:
    assert on_three_ranks(lambda: None, tmp_path) == [(None, "", number) for number in (1, 0, 0)]


def test_a_single_process_just_reads() -> None:
    own = content()
    assert load_on_main(DistEnv(), lambda: own) is own
