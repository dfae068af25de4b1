"""DeepLab-v2 and its recipe from first principles: the slow and obvious reference that the package is held against.

Written from the paper (arXiv:1606.00915), its prototxts and He et al. 2015, without anything of the package: plain
functions on {name: tensor} in float64, Python loops over pixels, one formula a line. torch is used for convolution,
max-pooling and automatic differentiation alone.
"""

import numpy as np
import torch
import torch.nn.functional as F

Parameters = dict[str, torch.Tensor]
MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)  # prototxt mean_value
AUTHORS_MEAN_BGR = (104.008, 116.669, 122.675)  # of cocostuff10k's deeplabv2_resnet101/train.prototxt
VOID = 255


# --- the network ------------------------------------------------------------------------------------------------------


def normalized(p: Parameters, name: str, x: torch.Tensor, *, trained: bool) -> torch.Tensor:
    """Batch normalisation by stored statistics, or by those of this very batch."""
    if trained:
        mean = x.sum((0, 2, 3)) / (x.shape[0] * x.shape[2] * x.shape[3])
        var = ((x - mean.view(1, -1, 1, 1)) ** 2).sum((0, 2, 3)) / (x.shape[0] * x.shape[2] * x.shape[3])
    else:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    mean, var, gain, shift = (v.view(1, -1, 1, 1) for v in (mean, var, p[f"{name}.weight"], p[f"{name}.bias"]))
    return gain * (x - mean) / (var + 1e-5) ** 0.5 + shift


def bottleneck(p: Parameters, name: str, x: torch.Tensor, *, stride: int, dilation: int, trained: bool) -> torch.Tensor:
    """1x1 (with the stride: Caffe's ResNets), 3x3 dilated, 1x1, plus the shortcut, which is projected where it must."""
    y = F.conv2d(x, p[f"{name}.conv1.weight"], stride=stride)
    y = normalized(p, f"{name}.bn1", y, trained=trained).clamp(min=0)
    y = F.conv2d(y, p[f"{name}.conv2.weight"], padding=dilation, dilation=dilation)
    y = normalized(p, f"{name}.bn2", y, trained=trained).clamp(min=0)
    y = normalized(p, f"{name}.bn3", F.conv2d(y, p[f"{name}.conv3.weight"]), trained=trained)
    if f"{name}.downsample.0.weight" in p:
        x = F.conv2d(x, p[f"{name}.downsample.0.weight"], stride=stride)
        x = normalized(p, f"{name}.downsample.1", x, trained=trained)
    return (x + y).clamp(min=0)


def logits(p: Parameters, image: torch.Tensor, blocks: tuple[int, ...], *, trained: bool) -> torch.Tensor:
    """Normalised image [B, 3, H, W] -> [B, classes, (H-1)/8+1, (W-1)/8+1]: res2..res5, output stride 8, ASPP-L."""
    x = F.conv2d(image, p["backbone.conv1.weight"], stride=2, padding=3)
    x = normalized(p, "backbone.bn1", x, trained=trained).clamp(min=0)
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True)
    for layer, count, stride, dilation in zip((1, 2, 3, 4), blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True):
        for block in range(count):
            name = f"backbone.layer{layer}.{block}"
            own = stride if block == 0 else 1
            x = bottleneck(p, name, x, stride=own, dilation=dilation, trained=trained)
    total = 0
    for branch, rate in enumerate((6, 12, 18, 24)):
        weight, bias = p[f"head.branches.{branch}.weight"], p[f"head.branches.{branch}.bias"]
        total = total + F.conv2d(x, weight, bias, padding=rate, dilation=rate)
    return total


def resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, the corner pixels' centres on each other."""
    rows = []
    for i in range(size[0]):
        row = []
        for j in range(size[1]):
            y, z = i * (x.shape[2] - 1) / (size[0] - 1), j * (x.shape[3] - 1) / (size[1] - 1)
            top, left = min(int(y), x.shape[2] - 2), min(int(z), x.shape[3] - 2)
            dy, dz = y - top, z - left
            upper = (1 - dz) * x[:, :, top, left] + dz * x[:, :, top, left + 1]
            lower = (1 - dz) * x[:, :, top + 1, left] + dz * x[:, :, top + 1, left + 1]
            row.append((1 - dy) * upper + dy * lower)
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def outputs(
    p: Parameters, image: torch.Tensor, blocks: tuple[int, ...], scales: tuple[float, ...], *, trained: bool = False
) -> list[torch.Tensor]:
    """Logits at each scale (the first is 1) and, for several, before them their maximum at the full grid."""
    each = []
    for scale in scales:
        size = tuple(round((length - 1) * scale) + 1 for length in image.shape[2:])
        each.append(logits(p, image if scale == 1 else resized(image, size), blocks, trained=trained))
    if len(each) == 1:
        return each
    fused = each[0]
    for other in each[1:]:
        larger = resized(other, tuple(fused.shape[2:]))
        fused = torch.where(larger > fused, larger, fused)
    return [fused, *each]


# --- the recipe -------------------------------------------------------------------------------------------------------


def network_input(
    image: np.ndarray, content: list[tuple[int, int]], mean_bgr: tuple[float, ...] = MEAN_BGR
) -> torch.Tensor:
    """uint8 RGB [B, 3, H, W] -> BGR minus the mean, exactly 0 where there is no content."""
    result = np.zeros(image.shape, dtype=np.float64)
    for b, (height, width) in enumerate(content):
        for channel in range(3):
            inside = image[b, 2 - channel, :height, :width].astype(np.float64)
            result[b, channel, :height, :width] = inside - mean_bgr[channel]
    return torch.from_numpy(result)


def sampled(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The label at the pixels on which a corner-aligned grid sits, halves rounded up."""
    result = np.zeros((label.shape[0], *size), dtype=np.int64)
    for i in range(size[0]):
        for j in range(size[1]):
            y = int(i * (label.shape[1] - 1) / (size[0] - 1) + 0.5)
            x = int(j * (label.shape[2] - 1) / (size[1] - 1) + 0.5)
            result[:, i, j] = label[:, y, x]
    return result


def loss_sum(output: torch.Tensor, label: np.ndarray) -> tuple[torch.Tensor, int]:
    """Sum of -log softmax at the label over the pixels that are not void, and their number."""
    total, count = output.sum() * 0, 0
    for b, i, j in np.ndindex(*label.shape):
        if label[b, i, j] != VOID:
            z = output[b, :, i, j]
            total = total + torch.log(torch.exp(z - z.max()).sum()) + z.max() - z[label[b, i, j]]
            count += 1
    return total, count


def authors_losses(each: list[torch.Tensor], label: np.ndarray) -> list[torch.Tensor]:
    """The losses of one image (batch 1) as the authors' prototxt has them: its own mean over its valid pixels.

    Outputs are fused, 1, 0.75 and 0.5; the logits of 0.75 are resized to the full grid first.
    """
    fused, full, middle, small = each
    losses = []
    for output in (fused, full, resized(middle, tuple(full.shape[2:])), small):
        total, count = loss_sum(output, sampled(label, tuple(output.shape[2:])))
        losses.append(total / max(1, count))
    return losses


def authors_gradient(
    p: Parameters,
    trainable: list[str],
    image: np.ndarray,
    label: np.ndarray,
    content: list[tuple[int, int]],
    blocks: tuple[int, ...],
) -> tuple[list[float], Parameters]:
    """Losses and gradient of a step of the authors' solver: one image after another, all divided by their number."""
    for name in trainable:
        p[name] = p[name].detach().requires_grad_()
    sums = [torch.zeros((), dtype=torch.float64)] * 4
    for b in range(len(image)):
        shown = network_input(image[b : b + 1], content[b : b + 1], AUTHORS_MEAN_BGR)
        own = authors_losses(outputs(p, shown, blocks, (1.0, 0.75, 0.5)), label[b : b + 1])
        sums = [before + loss / len(image) for before, loss in zip(sums, own)]
    gradient = torch.autograd.grad(torch.stack(sums).sum(), [p[name] for name in trainable])
    return [float(loss.detach()) for loss in sums], dict(zip(trainable, gradient))


def rate_and_decay(name: str, weight_decay: float) -> tuple[float, float]:
    """lr_mult and decay of a parameter: x1, x10 head weights, x20 head biases; convolution weights alone decay."""
    if name.startswith("head"):
        return (10.0, weight_decay) if name.endswith("weight") else (20.0, 0.0)
    is_norm = ".bn" in name or ".downsample.1." in name
    return (1.0, 0.0) if is_norm else (1.0, weight_decay)


def whole_step(
    p: Parameters,
    velocity: Parameters,
    trainable: list[str],
    micro_batches: list[tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]],
    *,
    blocks: tuple[int, ...],
    scales: tuple[float, ...],
    step: int,
    max_steps: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    trained_norm: bool = False,
) -> tuple[list[float], Parameters]:
    """Change `p` and `velocity` by one SGD step; return the losses of the outputs and the gradient.

    The loss of an output is its sum over all micro-batches' valid pixels, divided once by their number; each counts 1.
    """
    for name in trainable:
        p[name] = p[name].detach().requires_grad_()
    sums: list[torch.Tensor] = []
    counts: list[int] = []
    for image, label, content in micro_batches:
        results = outputs(p, network_input(image, content), blocks, scales, trained=trained_norm)
        parts = [loss_sum(output, sampled(label, tuple(output.shape[2:]))) for output in results]
        sums = [a + b for a, (b, _) in zip(sums, parts)] if sums else [part[0] for part in parts]
        counts = [a + b for a, (_, b) in zip(counts, parts)] if counts else [part[1] for part in parts]
    losses = [total / max(1, count) for total, count in zip(sums, counts)]
    gradient = dict(zip(trainable, torch.autograd.grad(sum(losses), [p[name] for name in trainable])))
    base = lr * (1 - step / max_steps) ** 0.9
    for name in trainable:
        multiplier, decay = rate_and_decay(name, weight_decay)
        old = velocity.get(name, torch.zeros_like(p[name]))
        velocity[name] = momentum * old + gradient[name] + decay * p[name].detach()
        p[name] = p[name].detach() - base * multiplier * velocity[name]
    return [float(loss.detach()) for loss in losses], gradient
