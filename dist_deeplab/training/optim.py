"""SGD with DeepLab-v2's learning rates per layer and its poly schedule, all of it on the device.

Rates and the decision to skip an update are tensors: the host never has to wait to learn whether a step counted.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from dist_deeplab.config import OptimConfig
from dist_deeplab.training.apex import apex_sgd

HEAD_WEIGHT_LR = 10.0  # lr_mult of fc1_voc12_c0..3 in the DeepLab-v2 prototxt; decay_mult 1
HEAD_BIAS_LR = 20.0  # decay_mult 0
_MULTIPLIERS = {"backbone": 1.0, "batch_norm": 1.0, "head_weight": HEAD_WEIGHT_LR, "head_bias": HEAD_BIAS_LR}
_DECAYED = {"backbone", "head_weight"}


def build_optimizer(net: nn.Module, config: OptimConfig) -> Optimizer:
    """SGD over the groups of a DeepLabV2's trainable parameters; each group keeps its `name` and `lr_mult`.

    backbone: x1, decay. batch_norm: x1, none. head_weight: x10, decay. head_bias: x20, none. Frozen parameters are in
    no group; empty groups are left out. torch's SGD adds the decay to the gradient before the momentum, as Caffe.

    Raises:
        ValueError: a parameter that belongs to no group or to two.
        UserError: `optim.implementation: apex` without an apex that has it.
    """
    groups = [
        {
            "name": name,
            "params": parameters,
            "lr_mult": _MULTIPLIERS[name],
            "lr": config.lr * _MULTIPLIERS[name],
            "weight_decay": config.weight_decay if name in _DECAYED else 0.0,
        }
        for name, parameters in group_parameters(net).items()
        if parameters
    ]
    if config.implementation == "apex":
        return apex_sgd(groups, lr=config.lr, momentum=config.momentum)
    # Fused, because it takes rates and the decision to skip as tensors.
    return SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def group_parameters(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{group: trainable parameters} of a DeepLabV2, each parameter in exactly one group.

    Raises:
        ValueError: a parameter that belongs to no group (a layer of a new kind) or to two (shared by two layers).
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in _MULTIPLIERS}
    taken: dict[int, str] = {}
    for name, owner, parameter in _named_parameters(net):
        if not parameter.requires_grad:
            continue
        group = _group_of(name, owner)
        if group is None:
            raise ValueError(f"{name} of a {type(owner).__name__} belongs to no parameter group; see training/optim.py")
        if id(parameter) in taken:
            raise ValueError(f"{name} ({group}) is in a parameter group already, as {taken[id(parameter)]}")
        taken[id(parameter)] = f"{name} ({group})"
        groups[group].append(parameter)
    return groups


def _named_parameters(net: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield (name, module that owns it, parameter), a shared one under each of its names."""
    for prefix, module in net.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, module, parameter


def _group_of(name: str, owner: nn.Module) -> str | None:
    part, leaf = name.partition(".")[0], name.rpartition(".")[2]
    kind = "conv" if isinstance(owner, nn.Conv2d) else "norm" if isinstance(owner, _BatchNorm) else "other"
    if part == "backbone" and kind == "norm":
        return "batch_norm"
    return {
        ("backbone", "conv", "weight"): "backbone",
        ("head", "conv", "weight"): "head_weight",
        ("head", "conv", "bias"): "head_bias",
    }.get((part, kind, leaf))


@torch.no_grad()
def load_optimizer(optimizer: Optimizer, state: dict[str, object]) -> None:
    """Restore an optimizer's `state_dict`, each momentum in the memory format of its parameter.

    torch's fused SGD walks through raw memory: with other strides it would pair up wrong elements without a word.
    Settings stay as they are here: torch would put back those that were saved, whatever the configuration says by now.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, values in optimizer.state.items():
        if values.get("momentum_buffer") is not None:
            values["momentum_buffer"] = torch.empty_like(parameter).copy_(values["momentum_buffer"])


def poly_lr(step: torch.Tensor | int, config: OptimConfig, *, max_steps: int) -> torch.Tensor:
    """The base rate of a step (0 .. max_steps-1): lr (1 - step/max_steps)^power, paper section 4.1.1.

    During the first `warmup_steps` it is multiplied by (step+1)/warmup_steps. float64 [], on the device of `step`.
    """
    done = torch.as_tensor(step).double()
    rate = config.lr * (1.0 - done / max_steps) ** config.power
    return rate * ((done + 1) / config.warmup_steps).clamp(max=1.0) if config.warmup_steps else rate


def set_lr(optimizer: Optimizer, base: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give every group the base rate times its multiplier, and return {group name: rate, float32 []}."""
    for group in optimizer.param_groups:
        group["lr"] = (base * group["lr_mult"]).float()
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def update_unless(optimizer: Optimizer, skip: torch.Tensor) -> None:
    """Make an optimizer step unless `skip` (bool [] on the device) is true; then nothing changes.

    torch's fused optimizers decide that on the device (the protocol that GradScaler uses too). Others are asked from
    the host, which costs a CPU-GPU synchronisation.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        if not optimizer.state:
            _start_momentum(optimizer)
        fused: Mapping[str, torch.Tensor | None] = {"found_inf": skip.float(), "grad_scale": None}
        vars(optimizer).update(fused)
        try:
            optimizer.step()
        finally:
            for name in fused:
                delattr(optimizer, name)
    elif not bool(skip):
        for group in optimizer.param_groups:
            group["lr"] = float(group["lr"])
        optimizer.step()


def _start_momentum(optimizer: Optimizer) -> None:
    """Start every momentum at 0: the first step is the same, and can be skipped, which fused SGD else gets wrong.

    (It makes them without values on the first call, and relies on that call to fill them.)
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def describe_groups(optimizer: Optimizer) -> list[str]:
    """A line for each group: name, tensors, parameters, rate and decay."""
    return [
        f"{g['name']:<12} {len(g['params']):>4} tensors {sum(p.numel() for p in g['params']):>11,} parameters  "
        f"lr x{g['lr_mult']:<4g} weight decay {g['weight_decay']:g}"
        for g in optimizer.param_groups
    ]
