"""The doctor on a device whose batch norm or head computes wrongly: broken_kernel.py batch_norm|head ARGUMENTS..."""

import sys
from typing import Any

import torch
from torch import nn

from dist_deeplab import doctor
from dist_deeplab.distributed.launcher import hard_exit
from dist_deeplab.model import sync_batch_norm

real_sum = sync_batch_norm._sum
real_convolution = nn.Conv2d._conv_forward


def half_of_a_sum(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return 0.5 * real_sum(tensor, group)


def wrong_where_dilated_by_24(
    self: nn.Conv2d, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    output = real_convolution(self, input, weight, bias)
    return output if self.dilation != (24, 24) or input.dtype == torch.float64 else output + 0.1


if sys.argv[1] == "batch_norm":
    sync_batch_norm._sum = half_of_a_sum
else:
    nn.Conv2d._conv_forward = wrong_where_dilated_by_24
hard_exit(doctor.main(sys.argv[2:]))
