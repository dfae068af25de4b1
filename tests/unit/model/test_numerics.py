"""The switch sets all that torch, cuBLAS and NCCL have, and takes torch's part back."""

import os
from collections.abc import Iterator

import pytest
import torch

from dist_deeplab.model.numerics import set_determinism

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
