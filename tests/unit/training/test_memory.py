"""The largest micro-batch is found; running out of memory is explained."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_deeplab.config import RunConfig, load_config
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import TrainingError
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training import memory
from dist_deeplab.training.memory import (
    explained_out_of_memory,
    find_micro_batch_size,
    free_memory_bytes,
    largest_fitting,
)
from dist_deeplab.training.memory_estimate import estimate_memory

SMALL = ("model.backbone=resnet_tiny", "data.crop_size=65", "data.num_classes=5")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


# --- batch.micro_size: auto -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 6, 7, 100])
def test_the_largest_size_that_does_not_run_out_of_memory_is_found(limit: int) -> None:
    def fits(size: int) -> bool:
        if size > limit + 1:
            raise OUT_OF_MEMORY
        return size <= limit  # one more runs through, but leaves too little

    assert largest_fitting([12, 6, 4, 3, 2, 1], fits) == max((s for s in (1, 2, 3, 4, 6, 12) if s <= limit), default=0)


def test_another_error_of_the_dry_run_is_not_taken_for_a_full_memory() -> None:
    def fits(size: int) -> bool:
        raise RuntimeError("cuDNN error")

    with pytest.raises(RuntimeError, match="cuDNN"):
        largest_fitting([2, 1], fits)


@pytest.mark.parametrize(("images", "expected"), [(100, 12), (12, 12), (11.9, 6), (4.5, 4), (3.9, 3), (1.01, 1)])
def test_on_a_cpu_activations_take_at_most_half_of_the_free_memory(
    images: float, expected: int, monkeypatch: Any
) -> None:
    config = _config("batch.micro_size=auto", "batch.global_size=12", "multi_scale.scales=[1.0,0.5]")
    each = estimate_memory(config, SCRATCH).image_bytes
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2 * 3 * images * each)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    split = find_micro_batch_size(config, DistEnv(), BatchSplit(12, 12, 1), SCRATCH)
    assert (split.global_size, split.micro_size, split.accumulation) == (12, expected, 12 // expected)


def test_all_ranks_take_the_smallest_of_their_sizes(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "gather_to_all", lambda own: [own, 3, 6])
    config = _config("batch.micro_size=auto", "batch.global_size=18")
    assert find_micro_batch_size(config, DistEnv(0, 0, 3), BatchSplit(18, 6, 3), SCRATCH).micro_size == 3


def test_a_resumed_run_keeps_its_size_also_on_other_ranks() -> None:
    config = _config("batch.micro_size=auto", "batch.global_size=12")
    for world_size, accumulation in ((1, 3), (2, 2), (3, 1), (4, 1)):
        split = BatchSplit.derive(global_size=12, micro_size=None, world_size=world_size)
        split = find_micro_batch_size(config, DistEnv(0, 0, world_size), split, SCRATCH, before=5)
        assert (split.micro_size, split.accumulation) == (5, accumulation)


def test_a_size_that_was_given_is_kept() -> None:
    split = BatchSplit(12, 3, 1)
    assert find_micro_batch_size(_config("batch.micro_size=3"), DistEnv(), split, SCRATCH) is split


def test_a_memory_too_small_for_one_image_is_said(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    with pytest.raises(TrainingError, match=r"not even one image of 65 .* speed\.recompute=true.* data\.crop_size"):
        find_micro_batch_size(_config("batch.micro_size=auto"), DistEnv(), BatchSplit(10, 10, 1), SCRATCH)


def test_the_dry_run_on_a_gpu_is_what_decides_there(monkeypatch: Any) -> None:
    tried = []

    def trial(*_: object) -> Any:
        def fits(size: int) -> bool:
            tried.append(size)
            if size > 2:
                raise OUT_OF_MEMORY
            return True

        return fits

    monkeypatch.setattr(memory, "_gpu_trial", trial)
    env: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    config = _config("batch.micro_size=auto", "batch.global_size=8")
    assert find_micro_batch_size(config, env, BatchSplit(8, 8, 1), SCRATCH).micro_size == 2
    assert tried == [8, 4, 3, 2]


def test_free_memory_is_some_part_of_the_machines() -> None:
    assert 2**26 < free_memory_bytes() < 2**46


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [OUT_OF_MEMORY, RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory")],
)
def test_running_out_of_memory_says_what_to_set(error: RuntimeError) -> None:
    config = _config("multi_scale.scales=[1.0,0.5]", "batch.global_size=24", "precision.dtype=fp32")
    with pytest.raises(TrainingError) as caught, explained_out_of_memory(config, BatchSplit(24, 6, 2)):
        raise error
    message = str(caught.value)
    assert "micro-batches of 6 images of 65" in message
    for remedy in (
        "batch.micro_size=4",
        "auto",
        "speed.recompute=true",
        "precision.dtype=bf16",
        "multi_scale",
        "crop_size",
    ):
        assert remedy in message


def test_what_is_set_already_is_not_proposed() -> None:
    config = _config("speed.recompute=true", "precision.dtype=bf16")
    with pytest.raises(TrainingError) as caught, explained_out_of_memory(config, BatchSplit(8, 1, 8)):
        raise OUT_OF_MEMORY
    assert not any(text in str(caught.value) for text in ("micro_size", "recompute", "bf16", "scales"))
    assert "more GPUs" in str(caught.value)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), explained_out_of_memory(_config(), BatchSplit(8, 8, 1)):
        raise RuntimeError("something else")


def test_a_trial_s_memory_is_free_before_the_allocator_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's traceback holds the activations: emptied inside the except clause, the cache would keep them."""
    activations: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def fits(size: int) -> bool:
        activation = torch.empty(size)
        activations.append(weakref.ref(activation))
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return True

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(ref() is not None for ref in activations)))
    assert largest_fitting([4, 2, 1], fits) == 1
    assert alive == [0, 0]
