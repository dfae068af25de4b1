"""Dilated ResNet backbones with output stride 8: the network up to res5 of DeepLab-v2's ResNet-101 prototxt.

Module names are torchvision's (`layer1` = res2 ... `layer4` = res5), so its state dicts load by name.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dist_deeplab.model.batch_norm import NormFactory, convolve_and_normalize
from dist_deeplab.model.recompute import recomputed

EXPANSION = 4  # a bottleneck's output channels per inner channel (He et al. 2015)


@dataclass(frozen=True)
class ResNetSpec:
    """Bottlenecks in res2 .. res5, and channels of the stem."""

    blocks: tuple[int, int, int, int]
    width: int = 64

    @property
    def out_channels(self) -> int:
        """Channels of the last feature map."""
        return self.width * 8 * EXPANSION


SPECS = {
    "resnet101": ResNetSpec((3, 4, 23, 3)),
    "resnet50": ResNetSpec((3, 4, 6, 3)),
    "resnet_tiny": ResNetSpec((1, 1, 2, 1), width=16),
}


def feature_length(length: int) -> int:
    """Number of features along an axis of `length` pixels: (n-1)/8+1 for n of 8k+1, else as the strides give."""
    stem = (length - 1) // 2 + 1
    pooled = -(-(stem - 1) // 2) + 1  # ceil mode
    return (pooled - 1) // 2 + 1


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (dilated), 1x1 expand, plus the shortcut.

    Caffe's ResNets stride on the first 1x1, torchvision's on the 3x3; weights belong to one of the two.
    """

    def __init__(
        self, in_channels: int, channels: int, *, stride: int, dilation: int, stride_on_1x1: bool, norm: NormFactory
    ) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        first, second = (stride, 1) if stride_on_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, stride=first, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, second, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = _Shortcut(shortcut, norm(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, 4*channels, H/stride, W/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(convolve_and_normalize(self.conv1, self.bn1, x))
        x = self.relu(convolve_and_normalize(self.conv2, self.bn2, x))
        return self.relu(convolve_and_normalize(self.conv3, self.bn3, x) + shortcut)


class _Shortcut(nn.Sequential):
    """A projection and its normalisation, by number as torchvision names them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shortcut with the channels and size of the branch that it is added to."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        return convolve_and_normalize(conv, norm, x)


class DilatedResNet(nn.Module):
    """ResNet whose res4 and res5 keep stride 1 and dilate by 2 and 4 instead (no multi-grid): output stride 8.

    contract_dilation: their first blocks dilate by half of that, as torchvision's and mmsegmentation's DeepLabs do.
    recompute: keep only the bottlenecks' inputs while training, and run each bottleneck again in the backward pass.
    """

    def __init__(
        self,
        spec: ResNetSpec,
        *,
        stride_on_1x1: bool,
        norm: NormFactory,
        contract_dilation: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        width = spec.width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)  # Caffe rounds up: 321 -> 161 -> 81
        layer = _LayerBuilder(width, stride_on_1x1, contract_dilation, norm)
        self.layer1 = layer(width, spec.blocks[0], stride=1, dilation=1)
        self.layer2 = layer(width * 2, spec.blocks[1], stride=2, dilation=1)
        self.layer3 = layer(width * 4, spec.blocks[2], stride=1, dilation=2)
        self.layer4 = layer(width * 8, spec.blocks[3], stride=1, dilation=4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map float [B, 3, H, W] to [B, out_channels, (H-1)/8+1, (W-1)/8+1] for H, W of 8k+1."""
        x = self.maxpool(self.relu(convolve_and_normalize(self.conv1, self.bn1, image)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = recomputed(block, x) if self.recompute and self.training else block(x)
        return x


class _LayerBuilder:
    """Builds the stages in order; the output channels of one are the input channels of the next."""

    def __init__(self, in_channels: int, stride_on_1x1: bool, contract_dilation: bool, norm: NormFactory) -> None:
        self.in_channels = in_channels
        self.stride_on_1x1 = stride_on_1x1
        self.contract_dilation = contract_dilation
        self.norm = norm

    def __call__(self, channels: int, num_blocks: int, *, stride: int, dilation: int) -> nn.Sequential:
        blocks = []
        for block in range(num_blocks):
            blocks.append(
                Bottleneck(
                    self.in_channels,
                    channels,
                    stride=stride if block == 0 else 1,
                    dilation=max(1, dilation // 2) if self.contract_dilation and block == 0 else dilation,
                    stride_on_1x1=self.stride_on_1x1,
                    norm=self.norm,
                )
            )
            self.in_channels = channels * EXPANSION
        return nn.Sequential(*blocks)
