"""The doctor on a device whose batch norm or head computes wrongly: broken_kernel.py batch_norm|head ARGUMENTS...

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
from dist_deeplab.model.deeplabv2 import ASPP

real_sum = rank_exchange.total
real_head = ASPP.forward
real_render = diagnostics.render


def half_of_a_sum(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return 0.5 * real_sum(tensor, group)


def wrong_head(self: ASPP, x: torch.Tensor) -> torch.Tensor:
    return real_head(self, x) * (1.0 if x.dtype == torch.float64 else 1.1)


def late(findings: Any) -> str:
    time.sleep(1)
    return real_render(findings)


diagnostics.render = late
if sys.argv[1] == "batch_norm":
    rank_exchange.total = half_of_a_sum
else:
    ASPP.forward = wrong_head
hard_exit(doctor.main(sys.argv[2:]))
