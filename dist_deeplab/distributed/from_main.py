"""What the main rank reads and every rank needs: a file is read and verified once, however many ranks there are.

A thousand ranks that each read and hash a checkpoint of 352 MB would ask their file system for 352 GB, and on nodes
with disks of their own they might not find the same bytes. So one rank reads, and the tensors travel through the
process group: by NCCL where there are GPUs, else by gloo, whose broadcast is a binomial tree, so that most nodes
receive them once and hand them on among their ranks.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_deeplab.distributed.process_group import DistEnv, broadcast_from_main
from dist_deeplab.errors import UserError

_GROUP_BYTES = 2**22  # that travel at once: with 2 to 4 gloo ranks 2 to 10 times as fast as tensor by tensor

T = TypeVar("T")


def load_on_main(env: DistEnv, load: Callable[[], T]) -> T:
    """The result of `load()`, which only the main rank calls, on every rank; every rank must call this.

    It is made of dictionaries, lists, tuples, CPU tensors and what JSON holds. Dictionaries arrive as plain ones;
    tensors keep type, shape and strides. No pickles travel: see `gather_bytes`.

    Raises:
        UserError: `load` raised one: on all ranks, with the same sentence.
    """
    if env.world_size == 1:
        return load()
    tensors: list[torch.Tensor] = []
    result, failure = None, None
    if env.is_main:
        try:
            result = load()
        except UserError as error:
            failure = error
    about = _describe(result, tensors) if env.is_main and failure is None else None
    about, problem = broadcast_from_main((about, str(failure or "")))
    if failure is not None:
        raise failure
    if problem:
        raise UserError(problem)
    if not env.is_main:
        result = _rebuild(about, tensors)
    _broadcast(env, tensors)
    return result  # type: ignore[return-value]


def wait_for_main(env: DistEnv, work: Callable[[], object]) -> None:
    """Call `work()` on the main rank, and leave on no rank before it is done; every rank must call this.

    For what a command says at its end: a rank whose exit code is not 0 makes torchrun end all others at once.

    Raises:
        UserError: `work` raised one: on all ranks, with the same sentence.
    """

    def worked() -> None:
        work()
        sys.stdout.flush()

    load_on_main(env, worked)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The value in JSON's types; its tensors, dense ones, are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        if value.stride() != torch.empty_like(value, device="meta").stride():  # with gaps, or repeated
            value = value.contiguous()
        tensors.append(value)
        return {"tensor": (str(value.dtype).removeprefix("torch."), value.shape, value.stride())}
    if isinstance(value, dict):
        return {"dict": [(key, _describe(item, tensors)) for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_describe(item, tensors) for item in value]}
    return value


def _rebuild(about: Any, tensors: list[torch.Tensor]) -> Any:
    """The value that `_describe` described; its tensors, still without their numbers, are appended to `tensors`."""
    if not isinstance(about, dict):
        return about
    ((kind, content),) = about.items()
    if kind == "tensor":
        dtype, shape, stride = content
        tensors.append(torch.empty_strided(shape, stride, dtype=getattr(torch, dtype)))
        return tensors[-1]
    if kind == "dict":
        return {key: _rebuild(item, tensors) for key, item in content}
    items = [_rebuild(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _broadcast(env: DistEnv, tensors: Iterable[torch.Tensor]) -> None:
    """Fill dense CPU tensors with the main rank's numbers, as bytes, so that their types do not count."""
    buffer = torch.empty(_GROUP_BYTES, dtype=torch.uint8)
    for pieces in _groups(tensors):
        sizes = [len(piece) for piece in pieces]
        part = buffer[: sum(sizes)]
        if env.is_main:
            torch.cat(pieces, out=part)
        there = part.to(env.device)
        dist.broadcast(there, src=0)
        if not env.is_main:
            for piece, numbers in zip(pieces, there.cpu().split(sizes), strict=True):
                piece.copy_(numbers)


def _groups(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors as bytes, in lists of up to `_GROUP_BYTES`."""
    group: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        for piece in tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).split(_GROUP_BYTES):
            if size + len(piece) > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(piece)
            size += len(piece)
    if group:
        yield group
