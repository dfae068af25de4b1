"""What a GPU would need for each kernel that the real code launches, by a roofline: no GPU takes part.

The network runs on tensors without memory (torch's meta device), and every operator that would launch kernels adds
their time to a clock: the longest of its arithmetic, its bytes and a kernel's shortest time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Gpu:
    """Rates that kernels reach. The default is an H100 SXM in bf16.

    matmul_flops: FLOP/s of convolutions: half of the data sheet's 989 TFLOP/s (dense).
    memory_bandwidth: bytes/s of everything else: 80 % of the data sheet's 3.35 TB/s.
    kernel_s: shortest time from one kernel's start to the next one's.
    activation_bytes: per value of an activation: 2 under autocast to bf16.
    """

    matmul_flops: float = 0.5 * 989e12
    memory_bandwidth: float = 0.8 * 3.35e12
    kernel_s: float = 3e-6
    activation_bytes: int = 2


H100 = Gpu()


class GpuModel(TorchDispatchMode):
    """Adds up seconds and launches of the operators that run in it, on meta tensors; `weight_gradients_s` are a part.

    Not modelled: what the caching allocator, cuDNN's choice of algorithms and clocks under a power limit do.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.reset()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        output = SHAPES[packet](*args) if packet in SHAPES else func(*args, **(kwargs or {}))
        if func.is_view or packet in WITHOUT_KERNEL:
            return output
        tensors = [
            t for t in tree_leaves((args, kwargs, output)) if isinstance(t, torch.Tensor) and t.device.type == "meta"
        ]
        if not tensors:
            return output  # the host's own arithmetic
        if packet in (aten.convolution, aten.convolution_backward):
            self._convolve(packet, args, output)
        else:
            passes = PASSES.get(packet)
            num_bytes = passes * self._bytes(tensors[0]) if passes else sum(map(self._bytes, tensors))
            self.add(num_bytes / self.gpu.memory_bandwidth)
        return output

    def reset(self) -> None:
        """Begin at zero."""
        self.seconds, self.weight_gradients_s, self.launches = 0.0, 0.0, 0

    def add(self, seconds: float) -> None:
        """One kernel of that many seconds, or of the shortest time."""
        self.seconds += max(seconds, self.gpu.kernel_s)
        self.launches += 1

    def _convolve(self, packet: Any, args: tuple[Any, ...], output: Any) -> None:
        """A convolution and the cast of its weight to bf16; or one for each gradient, and the cast of the weight's."""
        weight = args[1] if packet is aten.convolution else args[2]
        made = [output] if packet is aten.convolution else [t for t in output[:2] if t is not None]
        flops = flop_registry[packet](*args, out_val=output)
        num_bytes = sum(map(self._bytes, [args[0], args[1], *made]))
        each_s = max(flops / self.gpu.matmul_flops, num_bytes / self.gpu.memory_bandwidth) / len(made)
        for _ in made:
            self.add(each_s)
        if packet is aten.convolution_backward and output[1] is not None:
            self.weight_gradients_s += max(each_s, self.gpu.kernel_s)
        if self.gpu.activation_bytes < weight.element_size():
            self.add((weight.element_size() + self.gpu.activation_bytes) * weight.numel() / self.gpu.memory_bandwidth)

    def _bytes(self, tensor: torch.Tensor) -> int:
        floating = tensor.dim() == 4 and tensor.is_floating_point()
        return tensor.numel() * (self.gpu.activation_bytes if floating else tensor.element_size())


def _stats(input: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_per_channel(input, 2))


def _per_channel(input: torch.Tensor, number: int) -> list[torch.Tensor]:
    return [torch.empty(input.shape[1], device=input.device) for _ in range(number)]


# Kernels of synchronised batch norm for which torch has no shapes.
SHAPES: Mapping[Any, Callable[..., Any]] = {
    aten.batch_norm_stats: _stats,
    aten.batch_norm_gather_stats_with_counts: _stats,
    aten.batch_norm_elemt: lambda input, *_: torch.empty_like(input),
    aten.batch_norm_backward_reduce: lambda grad, *_: tuple(_per_channel(grad, 4)),
    aten.batch_norm_backward_elemt: lambda grad, *_: torch.empty_like(grad),
}
WITHOUT_KERNEL = {aten.detach, aten.empty, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
# Passes over their first tensor of operators that read it more than once: statistics and normalisation.
PASSES = {aten.native_batch_norm: 3, aten.native_batch_norm_backward: 5}
