"""Whether all ranks still hold the same network: a checksum of every tensor, made on the device."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dist_deeplab.distributed.process_group import gather_to_all, get_world_size
from dist_deeplab.errors import TrainingError
from dist_deeplab.logs import format_count

_MAX_NAMED = 3
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def check_replicas(model: nn.Module, *, buffers: bool = True, when: str = "at the start") -> None:
    """Compare a checksum of every parameter and buffer over the ranks; every rank must call it.

    Args:
        model: the network, not wrapped by DDP.
        buffers: false leaves buffers out, where each rank is meant to have its own statistics.
        when: for the error.

    Raises:
        TrainingError: naming the ranks and tensors that differ from most others'.
    """
    if get_world_size() == 1:
        return
    tensors = dict(_tensors(model, buffers=buffers))
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()]).tolist()  # the host waits
    if len(set(gather_to_all(digest(list(tensors), sums)))) == 1:  # 18 bytes of each rank, mostly all that travels
        return
    all_ranks = gather_to_all((list(tensors), sums))
    if any(names != list(tensors) for names, _ in all_ranks):
        raise TrainingError(f"the ranks hold networks of other tensors {when}; start all of them from the same code")
    different: dict[str, list[int]] = {}
    for number, name in enumerate(tensors):
        values = [sums[number] for _, sums in all_ranks]
        usual = Counter(values).most_common(1)[0][0]  # the first rank's, where no value is more common
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            different[name] = odd
    if different:
        ranks = sorted({rank for odd in different.values() for rank in odd})
        named = ", ".join(list(different)[:_MAX_NAMED])
        more = f" and {format_count(len(different) - _MAX_NAMED, 'more tensor')}" if len(different) > _MAX_NAMED else ""
        raise TrainingError(
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} of {len(all_ranks)} "
            f"{'holds' if len(ranks) == 1 else 'hold'} other values than the rest in {named}{more} {when}; do all have "
            "the same code, files and hardware? the same command resumes from the last checkpoint"
        )


def digest(names: Sequence[str], sums: Sequence[int]) -> str:
    """16 hexadecimal digits that differ where a tensor's name or checksum does."""
    return hashlib.sha256(json.dumps([names, sums]).encode()).hexdigest()[:16]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A checksum of a tensor's bits, int64 [] on its device; the memory format does not count.

    Each element's bits, times an odd number that grows with its position, are added up modulo 2^64: exact whatever the
    order, and any change of one element changes it.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()]).long()
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()


def _tensors(model: nn.Module, *, buffers: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    if buffers:
        yield from model.named_buffers()
