"""Global switches of torch's arithmetic: deterministic algorithms, and TF32."""

import os

import torch

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
