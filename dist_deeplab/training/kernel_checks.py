"""Whether a device computes what float64 on the CPU computes: the parts of a training step, in each arithmetic.

Every rank calls these checks. Inputs hold values that bfloat16 represents exactly, so that a difference is the
arithmetic's. A part's error is the largest |got - expected| / |expected| of its results (L2 norms).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from dist_deeplab.config import OptimConfig
from dist_deeplab.distributed.parallel import gradient_sync, prepare_model
from dist_deeplab.distributed.process_group import DistEnv, all_reduce_sum
from dist_deeplab.model.batch_norm import SyncBatchNorm, norm_factory
from dist_deeplab.model.deeplabv2 import ASPP, DeepLabV2, MultiScale
from dist_deeplab.training.loss import cross_entropy_sum, sample_label
from dist_deeplab.training.optim import build_optimizer, set_lr, update_unless
from dist_deeplab.training.precision import Precision

NUM_CLASSES, IGNORE_LABEL, CROP = 21, 255, 65
_EXACT, _TF32, _FP16, _BF16 = 2e-5, 5e-3, 4e-3, 2e-2  # a few units of the mantissa, over one or two layers

_LOSS_SCALE = 0.25  # keeps gradients inside float16's range

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Arithmetic:
    """Where and how to compute: `dtype` of weights and inputs, `autocast` for the forward pass."""

    env: DistEnv
    device: torch.device
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def tensor(self, *shape: int, seed: int) -> torch.Tensor:
        """Random values, the same bits in any arithmetic."""
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return values.to(self.device, self.dtype)


@dataclass(frozen=True)
class Check:
    """A part of a step. tolerances: by `precision.dtype`; ours, expected: its results on this rank."""

    name: str
    tolerances: Mapping[str, float]
    ours: Callable[[Arithmetic], Results]
    expected: Callable[[Arithmetic], Results]


def checks() -> list[Check]:
    """All parts, from the smallest to a whole step: the first that fails is the cause."""
    layer = {"fp32": _EXACT, "tf32": _TF32, "fp16": _FP16, "bf16": _BF16}
    exact = dict.fromkeys(layer, _EXACT)
    # A gradient through 20 normalised layers: a single ReLU that rounds to the other side shows in the third digit.
    deep = {"fp32": 0.02, "tf32": 0.1, "fp16": 0.25, "bf16": 0.5}
    split = {"fp32": 1e-4, "tf32": 0.02, "fp16": 0.02, "bf16": 0.1}
    return [
        Check("batch norm over all ranks", layer, _batch_norm, _batch_norm_of_the_whole),
        Check("ASPP head", layer, _head, _head),
        Check("loss", exact, _loss, _loss),
        Check("update", exact, _update, _update_by_formula),
        Check("gradient of a split batch", split, lambda a: _gradient(a, splits=2), lambda a: _gradient(a, splits=1)),
        Check("whole step", deep, _step, _step_of_the_whole),
    ]


def run_check(check: Check, env: DistEnv, precision: str) -> float:
    """This rank's relative error in an arithmetic (fp32, tf32, bf16, fp16); infinity where something is not finite."""
    arithmetic = Precision(precision, env.device)
    got = check.ours(Arithmetic(env, env.device, torch.float32, arithmetic.autocast))
    expected = check.expected(Arithmetic(env, torch.device("cpu"), torch.float64))
    return max(relative_error(got[name], expected[name]) for name in expected)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected| in float64, or infinity."""
    wide, reference = got.detach().double().cpu(), expected.detach().double().cpu()
    error = float((wide - reference).norm() / reference.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


# --- the parts --------------------------------------------------------------------------------------------------------

_CHANNELS, _IMAGES = 16, 3


def _batch_norm(arithmetic: Arithmetic) -> Results:
    env = arithmetic.env
    mine = slice(env.rank * _IMAGES, (env.rank + 1) * _IMAGES)
    whole, slope = _batch_norm_input(arithmetic)
    layer = SyncBatchNorm(_CHANNELS).to(arithmetic.device, arithmetic.dtype)
    with arithmetic.autocast():  # what a convolution would hand on
        probe = nn.functional.conv2d(whole[:1], whole.new_ones(1, _CHANNELS, 1, 1))
    x = whole[mine].to(probe.dtype).detach().requires_grad_()
    y = layer(x)
    y.backward(slope[mine].to(y.dtype))
    assert x.grad is not None
    weight_grad = all_reduce_sum(_grad(layer.weight).clone())
    return {"output": y, "input": x.grad, "weight": weight_grad, "running_var": _var(layer)}


def _batch_norm_of_the_whole(arithmetic: Arithmetic) -> Results:
    env = arithmetic.env
    mine = slice(env.rank * _IMAGES, (env.rank + 1) * _IMAGES)
    x, slope = _batch_norm_input(arithmetic)
    layer = nn.BatchNorm2d(_CHANNELS).to(arithmetic.dtype)
    x.requires_grad_()
    y = layer(x)
    y.backward(slope)
    assert x.grad is not None
    return {
        "output": y[mine],
        "input": x.grad[mine],
        "weight": _grad(layer.weight),
        "running_var": _var(layer),
    }


def _batch_norm_input(arithmetic: Arithmetic) -> tuple[torch.Tensor, torch.Tensor]:
    shape = arithmetic.env.world_size * _IMAGES, _CHANNELS, 9, 7
    return arithmetic.tensor(*shape, seed=0) + 1, arithmetic.tensor(*shape, seed=1)


def _head(arithmetic: Arithmetic) -> Results:
    head = ASPP(32, NUM_CLASSES).to(arithmetic.device, arithmetic.dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(head.parameters()):
            parameter.copy_(arithmetic.tensor(*parameter.shape, seed=seed))
    x = arithmetic.tensor(2, 32, 41, 41, seed=100).requires_grad_()
    with arithmetic.autocast():
        y = head(x)
    y.backward(arithmetic.tensor(*y.shape, seed=101).to(y.dtype))
    weights = torch.cat([_grad(parameter).flatten() for parameter in head.parameters()])
    return {"logits": y, "input": _grad(x), "weights": weights}


def _loss(arithmetic: Arithmetic) -> Results:
    logits = arithmetic.tensor(2, NUM_CLASSES, 41, 41, seed=0).requires_grad_()
    loss = cross_entropy_sum(logits, _labels(2, 41).long().to(arithmetic.device), IGNORE_LABEL)
    loss.backward()
    return {"loss": loss, "logits": _grad(logits)}


def _update(arithmetic: Arithmetic) -> Results:
    """Two updates by the optimizer, the second with momentum."""
    net = _network(arithmetic, "frozen")
    start = _flat(_trained(net))
    optimizer = build_optimizer(net, OptimConfig())
    for seed in (0, 1):
        for number, parameter in enumerate(_trained(net)):
            parameter.grad = arithmetic.tensor(*parameter.shape, seed=1000 * seed + number).contiguous()
        set_lr(optimizer, torch.tensor(0.01, dtype=torch.float64, device=arithmetic.device))
        update_unless(optimizer, torch.tensor(False, device=arithmetic.device))
    return {"moved": _flat(_trained(net)) - start}


def _update_by_formula(arithmetic: Arithmetic) -> Results:
    """v = m v + g + d w; w = w - lr v (SGD with momentum m and weight decay d)."""
    net = _network(arithmetic, "frozen")
    start = _flat(_trained(net))
    groups = build_optimizer(net, OptimConfig()).param_groups
    number = {id(parameter): place for place, parameter in enumerate(_trained(net))}
    with torch.no_grad():
        for group in groups:
            for parameter in group["params"]:
                velocity = torch.zeros_like(parameter)
                for seed in (0, 1):
                    gradient = arithmetic.tensor(*parameter.shape, seed=1000 * seed + number[id(parameter)])
                    velocity = group["momentum"] * velocity + gradient + group["weight_decay"] * parameter
                    parameter -= 0.01 * group["lr_mult"] * velocity
    return {"moved": _flat(_trained(net)) - start}


def _gradient(arithmetic: Arithmetic, *, splits: int) -> Results:
    """The gradient of 4 images with frozen batch norm, in 1 or 2 parts."""
    model = MultiScale(_network(arithmetic, "frozen"))
    image, label = arithmetic.tensor(4, 3, CROP, CROP, seed=0), _labels(4, CROP)
    for part, its_label in zip(image.chunk(splits), label.chunk(splits), strict=True):
        _loss_of(arithmetic, model, part, its_label).backward()
    return {"gradient": _flat([_grad(parameter) for parameter in _trained(model)])}


def _step(arithmetic: Arithmetic) -> Results:
    """The gradient of 2 images per rank with synchronised batch norm, through DDP."""
    env = arithmetic.env
    net = _network(arithmetic, "sync")
    model = prepare_model(MultiScale(net), env).train()
    mine = slice(2 * env.rank, 2 * env.rank + 2)
    image, label = arithmetic.tensor(2 * env.world_size, 3, CROP, CROP, seed=0), _labels(2 * env.world_size, CROP)
    with gradient_sync(model, enabled=True):
        loss = _loss_of(arithmetic, model, image[mine], label[mine])
        (loss * env.world_size).backward()
    return {"gradient": _flat([_grad(parameter) for parameter in _trained(net)]), "loss": all_reduce_sum(loss.detach())}


def _step_of_the_whole(arithmetic: Arithmetic) -> Results:
    """The same of all ranks' images in one process, with torch's batch norm."""
    alone = norm_factory("local")
    net = _network(arithmetic, "sync", norm=alone)
    num_images = 2 * arithmetic.env.world_size
    image, label = arithmetic.tensor(num_images, 3, CROP, CROP, seed=0), _labels(num_images, CROP)
    loss = _loss_of(arithmetic, MultiScale(net).train(), image, label)
    loss.backward()
    return {"gradient": _flat([_grad(parameter) for parameter in _trained(net)]), "loss": loss}


def _network(arithmetic: Arithmetic, mode: str, norm: Callable[[int], nn.Module] | None = None) -> DeepLabV2:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = DeepLabV2("resnet_tiny", NUM_CLASSES, norm=norm or norm_factory(mode))  # type: ignore[arg-type]
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad:
                    module.weight.fill_(1.0)  # a zero-initialised residual branch has no gradient inside
    return net.to(arithmetic.device, arithmetic.dtype)


def _loss_of(arithmetic: Arithmetic, model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    with arithmetic.autocast():
        logits = model(image)["scale_1"]
    sampled = sample_label(label, (logits.shape[2], logits.shape[3])).to(arithmetic.device)
    return cross_entropy_sum(logits, sampled, IGNORE_LABEL) * _LOSS_SCALE


def _labels(num_images: int, size: int) -> torch.Tensor:
    """Bands of all classes, the upper eighth void: uint8 [N, size, size]."""
    bands = (torch.arange(size) // 4 % NUM_CLASSES).to(torch.uint8).view(1, size, 1).repeat(num_images, 1, size)
    bands[:, : size // 8] = IGNORE_LABEL
    return bands


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _var(layer: nn.BatchNorm2d) -> torch.Tensor:
    assert layer.running_var is not None
    return layer.running_var


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
