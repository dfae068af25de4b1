"""SGD with DeepLab-v2's learning rates per layer and its poly schedule."""

from torch import nn
from torch.optim import SGD, Optimizer

from dist_deeplab.config import OptimConfig

HEAD_WEIGHT_LR = 10.0  # lr_mult of fc1_voc12_c0..3 in the DeepLab-v2 prototxt; decay_mult 1
HEAD_BIAS_LR = 20.0  # decay_mult 0


def build_optimizer(net: nn.Module, config: OptimConfig) -> Optimizer:
    """Return SGD over four groups of a DeepLabV2's trainable parameters; each group keeps its `name` and `lr_mult`.

    backbone: x1, decay. batch_norm: x1, none. head_weight: x10, decay. head_bias: x20, none. Frozen parameters are in
    no group; empty groups are left out. torch's SGD adds the decay to the gradient before the momentum, as Caffe.
    """
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "batch_norm": [], "head_weight": [], "head_bias": []}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("head."):
            groups["head_bias" if name.endswith(".bias") else "head_weight"].append(parameter)
        else:
            groups["backbone" if parameter.ndim == 4 else "batch_norm"].append(parameter)
    multipliers = {"head_weight": HEAD_WEIGHT_LR, "head_bias": HEAD_BIAS_LR}
    decayed = {"backbone", "head_weight"}
    return SGD(
        [
            {
                "name": name,
                "params": parameters,
                "lr_mult": multipliers.get(name, 1.0),
                "lr": config.lr * multipliers.get(name, 1.0),
                "weight_decay": config.weight_decay if name in decayed else 0.0,
            }
            for name, parameters in groups.items()
            if parameters
        ],
        lr=config.lr,
        momentum=config.momentum,
        foreach=True,
    )


def poly_lr(step: int, config: OptimConfig, *, max_steps: int) -> float:
    """Return the base rate of a step (0 .. max_steps-1): lr (1 - step/max_steps)^power, paper section 4.1.1.

    During the first `warmup_steps` it is multiplied by (step+1)/warmup_steps.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * (1.0 - step / max_steps) ** config.power * warmup


def set_lr(optimizer: Optimizer, base: float) -> dict[str, float]:
    """Give every group the base rate times its multiplier, and return {group name: rate}."""
    for group in optimizer.param_groups:
        group["lr"] = base * group["lr_mult"]
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def describe_groups(optimizer: Optimizer) -> list[str]:
    """Return a line for each group: name, tensors, parameters, rate and decay."""
    return [
        f"{g['name']:<12} {len(g['params']):>4} tensors {sum(p.numel() for p in g['params']):>11,} parameters  "
        f"lr x{g['lr_mult']:<4g} weight decay {g['weight_decay']:g}"
        for g in optimizer.param_groups
    ]
