"""Arithmetic: deterministic algorithms, tf32, and which lower precision a device is made for."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BY_PREFERENCE = ("fp32", "fp16", "bf16")  # each device can do those before its own

_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is reproducible only with fixed workspaces (its manual, 2.1.4)
    "NCCL_ALGO": "Ring",  # NCCL otherwise chooses the order of summation in each process
}


def set_determinism(enabled: bool) -> None:
    """Allow only deterministic algorithms, or any; call before the first use of a GPU and before the process group.

    With them a run repeats itself bit by bit on the same hardware and number of ranks, at lower speed.
    The loss and the resizing of logits are deterministic either way: see model/deeplabv2.py and training/loss.py.
    Environment variables that are set already are kept.
    """
    if enabled:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it
    torch.backends.cudnn.deterministic = enabled


def allow_tf32(dtype: str) -> None:
    """Set torch's global matmul and convolution precision for a `precision.dtype`: its own defaults differ for the two.

    Commands that score a finished network call this too, to compute as the run's own evaluations did.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"


def autocast(dtype: str, device: torch.device, *, cache: bool = True) -> AbstractContextManager[Any]:
    """The context in which a network computes in a `precision.dtype`; `cache` the weights' copies until it is left."""
    lower = AUTOCAST.get(dtype)
    return torch.autocast(device.type, dtype=lower, enabled=lower is not None, cache_enabled=cache)


def fastest_dtype(device: torch.device, *, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The `precision.dtype` that a device is made for: bf16, on older tensor cores fp16, else fp32.

    bf16 on GPUs from Ampere on (compute capability 8.0) and on CPUs with AMX, where ResNet-101 trains 2.7 times as fast
    as in fp32; a CPU without AMX emulates bf16, some 8 times slower. fp16 on Volta and Turing (7.x). ROCm's GPUs with
    matrix cores (CDNA, RDNA 3) report 9.0 and above and have bf16.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    try:
        flags = next(line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return "fp32"
    return "bf16" if "amx_bf16" in flags.split() else "fp32"


def common_dtype(dtypes: Iterable[str]) -> str:
    """The best of the precisions that all of several devices are made for."""
    return min(dtypes, key=_BY_PREFERENCE.index)
