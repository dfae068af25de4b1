"""The doctor on a device whose batch norm sums wrongly over ranks: torchrun broken_kernel.py ARGUMENTS...

Its main rank reports late: the exit codes of the others must not make torchrun end it before.
"""

import sys
import time
from typing import Any

import torch

from dist_deeplab import doctor
from dist_deeplab.distributed import diagnostics
from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.model import rank_exchange

real_sum = rank_exchange.total
real_render = diagnostics.render


def half_of_a_sum(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return 0.5 * real_sum(tensor, group)


def late(findings: Any) -> str:
    time.sleep(1)
    return real_render(findings)


diagnostics.render = late
rank_exchange.total = half_of_a_sum
hard_exit(doctor.main(sys.argv[1:]))
