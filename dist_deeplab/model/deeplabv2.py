"""DeepLab-v2 (Chen et al., arXiv:1606.00915): dilated ResNet + ASPP, and its multi-scale training form."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from dist_deeplab.model.batch_norm import NormFactory
from dist_deeplab.model.resnet import SPECS, Bottleneck, DilatedResNet, feature_length

ASPP_RATES = (6, 12, 18, 24)  # ASPP-L of the paper, section 4.1.2; fc1_voc12_c0 .. c3 of the prototxt


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: parallel dilated 3x3 convolutions with bias, summed.

    All taps of all branches are computed together, as one 1x1 convolution; the output of each tap is then added at its
    offset. So `x`, by far the largest tensor here, and its gradient are read once instead of four times, and no kernel
    has as few output channels as there are classes. Hooks of the branches are not called.

    Compiled or exported, the branches stay convolutions: `fold` compiled by torch 2.13 writes beyond its memory on a
    CPU.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in ASPP_RATES
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes, H, W], at least float32."""
        convs = [branch for branch in self.branches if isinstance(branch, nn.Conv2d)]
        if torch.compiler.is_compiling():
            return _widened(torch.stack([conv(x) for conv in convs])).sum(0)
        weight = torch.stack([conv.weight for conv in convs])  # [branches, classes, channels, 3, 3]
        # `fold` scatters where a convolution gathers, so the kernels are flipped.
        taps = weight.flip(3, 4).permute(0, 1, 3, 4, 2).reshape(-1, x.shape[1], 1, 1)
        shares = _widened(F.conv2d(x, taps)).flatten(2)  # [B, branches x classes x 9, H x W]
        logits = shares.new_zeros(())
        for share, rate, conv in zip(shares.chunk(len(convs), dim=1), ASPP_RATES, convs, strict=True):
            assert conv.bias is not None
            placed = F.fold(share, x.shape[2:], kernel_size=3, dilation=rate, padding=rate)
            logits = logits + placed + conv.bias.view(1, -1, 1, 1)
        return logits


def _widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


class DeepLabV2(nn.Module):
    """Image -> logits on a grid of stride 8, logit (i, j) on pixel (8i, 8j) for sizes of 8k+1.

    Weights start random: He-normal convolutions (fan out), head N(0, 0.01) with bias 0 (prototxt `weight_filler`).
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        norm: NormFactory,
        stride_on_1x1: bool = True,
        contract_dilation: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        spec = SPECS[backbone]
        self.backbone = DilatedResNet(
            spec,
            stride_on_1x1=stride_on_1x1,
            contract_dilation=contract_dilation,
            norm=norm,
            recompute=recompute,
        )
        self.head = ASPP(spec.out_channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator; batch norm is 1 and 0 from its construction.

        But each residual branch's last gain is 0 where it is trained (Goyal et al. 2017, section 5.1): a random
        ResNet-101 starts near the uniform loss instead of diverging at the recipe's rate for the head.
        """
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck) and module.bn3.weight.requires_grad:
                nn.init.zeros_(module.bn3.weight)
        for branch in self.head.branches:
            assert isinstance(branch, nn.Conv2d)
            assert branch.bias is not None
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map normalised float [B, 3, H, W] to logits [B, num_classes, (H-1)/8+1, (W-1)/8+1]."""
        return self.head(self.backbone(image))


class MultiScale(nn.Module):
    """The network at several input scales in one forward pass, as it is trained.

    Returns {"scale_1": logits, "scale_0.75": ..., "fused": element-wise max of all at the full grid}, each of the
    others on its own grid, those of the scales in `full_grid` resized to the full one; with no scales
    {"scale_1": logits} alone (paper, section 4.1.1; DrSleep's train_msc).
    """

    def __init__(self, net: DeepLabV2, scales: tuple[float, ...] = (), *, full_grid: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.net = net
        self.scales = tuple(sorted(scales or (1.0,), reverse=True))
        self.full_grid = full_grid

    def output_sizes(self, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Grid (rows, columns) of each output for an input of `size` (8k+1 in both directions)."""
        shown = {scale: 1.0 if scale in self.full_grid else scale for scale in self.scales}
        sizes = {output_name(s): (grid_length(size[0], on), grid_length(size[1], on)) for s, on in shown.items()}
        return sizes if len(self.scales) == 1 else {"fused": sizes[output_name(1.0)], **sizes}

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map normalised float [B, 3, H, W] to {name: logits [B, num_classes, h, w]}."""
        outputs = {output_name(scale): self.net(resize_input(image, scale)) for scale in self.scales}
        if len(self.scales) == 1:
            return outputs
        full = outputs[output_name(1.0)]
        fused = full
        for scale in self.scales[1:]:
            resized = upsample_logits(outputs[output_name(scale)], full.shape[2:])
            fused = torch.maximum(fused, resized)
            if scale in self.full_grid:
                outputs[output_name(scale)] = resized
        return {"fused": fused, **outputs}


def output_name(scale: float) -> str:
    """Name of the output at an input scale, as in metrics: `scale_0.75`."""
    return f"scale_{scale:g}"


def scaled_length(length: int, scale: float) -> int:
    """Corner-aligned length of an axis scaled by `scale`: (n-1)s+1, e.g. 321 -> 241 at 0.75."""
    return round((length - 1) * scale) + 1


def grid_length(length: int, scale: float = 1.0) -> int:
    """Number of logits along an axis of `length` pixels at an input scale, e.g. 321 -> 41, 31, 21."""
    return feature_length(scaled_length(length, scale))


def resize_input(image: torch.Tensor, scale: float) -> torch.Tensor:
    """The image scaled by `scale`, bilinear, corners aligned."""
    if scale == 1.0:
        return image
    return upsample(image, (scaled_length(image.shape[2], scale), scaled_length(image.shape[3], scale)))


def upsample(x: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Float [B, C, h, w] resized to `size`, bilinear, corners aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def upsample_logits(x: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """`upsample` as two products with constant matrices, in float32 (float64 for such input).

    Their gradient adds up in a fixed order, which that of torch's bilinear interpolation on CUDA does not.
    """
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        wide = _widened(x)
        rows, columns = (_interpolation(old, new, wide) for old, new in zip(x.shape[2:], size, strict=True))
        return rows.T @ wide @ columns


@torch.no_grad()
def _interpolation(points: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """Interpolation matrix [points, length]: weight of each of `points` values at each of `length` positions."""
    unit = torch.eye(points, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], size=length, mode="linear", align_corners=True)[0]
