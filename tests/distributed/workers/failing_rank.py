"""Run a command as torchrun does, with NCCL's manners: closing the process group, or waiting for a rank that is gone,
never returns.

    torchrun --nproc_per_node 2 failing_rank.py FAULT COMMAND ARGUMENTS...

FAULT: `oom` (rank 1's convolutions run out of memory), or OLD=NEW (on rank 1, in the arguments: damaged files).
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def block(*arguments: object) -> None:
    time.sleep(3600)


def never_failing(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: object, **options: object) -> object:
        try:
            return collective(*arguments, **options)
        except RuntimeError:
            return block()

    return call


def out_of_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def main(fault: str, command: str, *arguments: str) -> None:
    """Does not return: the command ends the process."""
    dist.destroy_process_group = block
    for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier"):
        setattr(dist, name, never_failing(getattr(dist, name)))
    if os.environ["RANK"] == "1":
        if fault == "oom":
            nn.Conv2d.forward = out_of_memory
        else:
            old, new = fault.split("=")
            arguments = tuple(argument.replace(old, new) for argument in arguments)
    sys.argv = [command, *arguments]
    runpy.run_module(f"dist_deeplab.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
