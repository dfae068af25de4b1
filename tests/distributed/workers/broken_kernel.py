"""The doctor on a device whose batch norm sums wrongly over ranks."""

import time
from typing import Any

import torch

from dist_deeplab import doctor
from dist_deeplab.distributed import diagnostics
from dist_deeplab.model import rank_exchange

real_sum = rank_exchange.total
real_render = diagnostics.render


def half_of_a_sum(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return 0.5 * real_sum(tensor, group)


def late(findings: Any) -> str:
    time.sleep(1)
    return real_render(findings)


def main(arguments: list[str]) -> int:
    """The doctor's exit code. The main rank reports late: that of another rank must not end it before."""
    diagnostics.render = late
    rank_exchange.total = half_of_a_sum
    return doctor.main(arguments)
