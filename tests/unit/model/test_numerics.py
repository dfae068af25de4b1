"""Determinism is switched on and off as a whole; a device computes in the precision that it is made for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_deeplab.model.numerics import common_dtype, fastest_dtype, set_determinism

VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


@pytest.fixture(autouse=True)
def torchs_own_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_the_switch_turns_determinism_on_and_off() -> None:
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert {name: os.environ.get(name) for name in VARIABLES} == VARIABLES
    set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_the_switch_keeps_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    set_determinism(True)
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_without_the_switch_the_environment_is_left_alone() -> None:
    set_determinism(False)
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu sse2 avx512f amx_bf16 amx_tile\n", "bf16"),
        ("processor: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16\n", "fp32"),  # instructions, but no matrix unit
        ("processor: 0\nFeatures: fp asimd\n", "fp32"),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_amx(cpuinfo: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert fastest_dtype(torch.device("cpu"), cpuinfo=tmp_path / "cpuinfo") == expected
    assert fastest_dtype(torch.device("cpu"), cpuinfo=tmp_path / "absent") == "fp32"


@pytest.mark.parametrize(
    ("capability", "expected"), [((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_a_gpu_computes_in_what_its_tensor_cores_have(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert fastest_dtype(torch.device("cuda", 0)) == expected


def test_different_devices_compute_in_what_all_have() -> None:
    assert common_dtype(["bf16", "fp16", "bf16"]) == "fp16"
    assert common_dtype(["bf16", "fp32"]) == "fp32"
    assert common_dtype(["bf16", "bf16"]) == "bf16"
