"""The network's forward and backward pass as two CUDA graphs, which the host launches at once (`speed.cuda_graph`).

A step of few images takes a GPU less time than the host needs to launch its thousands of kernels one by one. Loss,
update and the all-reduce of gradients stay outside, so DDP begins to communicate when backward is over.
Has not run on a GPU yet: therefore off by default, and compared with the plain network before the first step.
"""

import logging
from collections.abc import Callable

import torch
from torch import nn

from dist_deeplab.config import RunConfig
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import TrainingError, UserError
from dist_deeplab.logs import format_count
from dist_deeplab.model.numerics import autocast
from dist_deeplab.training.buffers import copy_buffers, restore_buffers

TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 2e-2, "fp16": 1e-2}  # of the norm; kernels may add in another order

log = logging.getLogger(__name__)


def require_cuda_graph(config: RunConfig, env: DistEnv, split: BatchSplit) -> None:
    """Refuse `speed.cuda_graph` where a graph can't be captured.

    Raises:
        UserError: no GPU, or a setting that it does not go with; with what to set instead.
    """
    speed, norm = config.speed, config.model.batch_norm_used
    refused = {
        "needs a GPU": env.device.type != "cuda",
        "does not go with speed.compile=true": speed.compile,
        "does not go with speed.recompute=true": speed.recompute,
        "does not go with precision.backend=apex": config.precision.backend == "apex",
        "takes micro-batches of one size; choose a batch.micro_size that divides each process's share": (
            not split.is_even
        ),
        "does not go with batch norm that communicates; set model.batch_norm=frozen": (
            norm == "sync" and env.world_size > 1
        ),
    }
    reasons = [reason for reason, applies in refused.items() if applies]
    if reasons:
        raise UserError(f"speed.cuda_graph=true {reasons[0]}, or set speed.cuda_graph=false")


def graph_network(network: nn.Module, image: torch.Tensor, dtype: str) -> None:
    """Let a network in training mode replay CUDA graphs, in place; its weights must be those of the run already.

    Its gradients exist from now on and must be set to zero in place (`zero_gradients`): were they None, autograd would
    take the graph's own memory for them, which the next micro-batch overwrites.

    Args:
        network: a `MultiScale` in training mode, on the GPU.
        image: float32 [B, 3, H, W] like each micro-batch.
        dtype: the run's `precision.dtype`.

    Raises:
        TrainingError: replayed, it does not give what the plain network gives.
    """
    buffers = copy_buffers(network)
    eager = network.forward
    expected = _results(network, eager, image, dtype)
    with autocast(dtype, image.device, cache=False):
        torch.cuda.make_graphed_callables(network, (image.clone(),))
    found = _results(network, network.forward, image, dtype)
    for (name, wanted), (_, got) in zip(expected, found, strict=True):
        error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error <= TOLERANCE[dtype]:
            raise TrainingError(
                f"speed.cuda_graph=true changes {name}: relative error {error:.2g}, {TOLERANCE[dtype]:g} is allowed; "
                "set speed.cuda_graph=false"
            )
    restore_buffers(network, buffers, where=torch.tensor(True, device=image.device))
    zero_gradients(network)
    log.info(
        "speed.cuda_graph=true: outputs and gradients of %s equal the plain network's",
        format_count(len(image), "image"),
    )


def is_graphed(network: nn.Module) -> bool:
    """Whether `graph_network` was applied: torch puts the replaying function in place of `forward`."""
    return "forward" in vars(network)


def zero_gradients(network: nn.Module) -> None:
    """Set the gradients to zero where they are, and make those that are not there."""
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    torch._foreach_zero_([p.grad for p in network.parameters() if p.grad is not None])


def _results(
    network: nn.Module, forward: Callable[[torch.Tensor], dict[str, torch.Tensor]], image: torch.Tensor, dtype: str
) -> list[tuple[str, torch.Tensor]]:
    """Outputs for an image and the gradients of two micro-batches, of different images, by name; in float32."""
    zero_gradients(network)
    outputs = {}
    for sample in (torch.flip(image, [3]) * 2, image):
        with autocast(dtype, image.device):
            outputs = forward(sample)
        torch.stack([logits.float().square().mean() for logits in outputs.values()]).sum().backward()
    gradients = {f"the gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    found = {f"output {name}": logits for name, logits in outputs.items()} | gradients
    return [(name, tensor.detach().float().clone()) for name, tensor in found.items()]
