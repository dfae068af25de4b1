"""Other people's networks in plain torch, each in its own structure, names and conventions, with random weights.

Written from the public sources of each family, not from ours: they share no code with the package. Every network
keeps the output of each of its convolutions and batch norms, so that a difference can be traced to its layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BLOCKS_101 = (3, 4, 23, 3)
BLOCKS_50 = (3, 4, 6, 3)
RATES = (6, 12, 18, 24)

Outputs = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def randomise(net: nn.Module, seed: int) -> None:
    """Draw weights and statistics that no initialisation gives; the variances are small, so that epsilon counts."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.data.normal_(0, 1, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.3, 0.9, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
            module.running_mean.data.normal_(0, 0.3, generator=generator)
            module.running_var.data.uniform_(0.05, 1, generator=generator)
            module.num_batches_tracked += 17


def outputs_of(net: nn.Module, image: torch.Tensor) -> Outputs:
    """Outputs of all convolutions and batch norms, by module name, and the network's own as `logits`."""
    outputs: Outputs = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _input: Any, output: torch.Tensor) -> None:
            outputs[name] = output.clone()  # a ReLU behind it may work in place

        return hook

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(keep(name)) for name, m in net.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        outputs["logits"] = net.eval()(image)
    for hook in hooks:
        hook.remove()
    return outputs


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=bias)


# --- torchvision (also timm, isht7, mmsegmentation): models/resnet.py -------------------------------------------------


class TorchvisionBottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, first: bool, caffe_style: bool) -> None:
        super().__init__()
        self.conv1 = _conv(inplanes, planes, 1, stride if caffe_style else 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, 1 if caffe_style else stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        if first:
            self.downsample = nn.Sequential(_conv(inplanes, 4 * planes, 1, stride), nn.BatchNorm2d(4 * planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class TorchvisionResNet(nn.Module):
    """dilations: of the first and of the other blocks of layer3 and layer4. A classifier `fc` lies beside, unused."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        *,
        dilations: tuple[tuple[int, int], tuple[int, int]] = ((2, 2), (4, 4)),
        caffe_style: bool = False,
        with_fc: bool = True,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
        plan = zip(range(4), blocks, (1, 2, 1, 1), ((1, 1), (1, 1), *dilations), strict=True)
        inplanes = width
        for stage, num, stride, (first, others) in plan:
            planes = width * 2**stage
            layers = []
            for block in range(num):
                own = (stride, first) if block == 0 else (1, others)
                layers.append(TorchvisionBottleneck(inplanes, planes, *own, block == 0, caffe_style))
                inplanes = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        if with_fc:
            self.fc = nn.Linear(inplanes, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class BackboneAndHeads(nn.Module):
    """A backbone with heads beside it that are no part of DeepLab-v2, as torchvision and mmsegmentation save them."""

    def __init__(self, backbone: nn.Module, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, head in heads.items():
            setattr(self, name, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)


# --- isht7/pytorch-deeplab-resnet: deeplab_resnet.py ------------------------------------------------------------------


class Isht7Classifier(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(_conv(channels, num_classes, 3, 1, rate, True) for rate in RATES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(conv(x) for conv in self.conv2d_list)


class Isht7ResNet(TorchvisionResNet):
    def __init__(self, blocks: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__(blocks, width, caffe_style=True, with_fc=False, ceil_mode=True)
        self.layer5 = Isht7Classifier(32 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer5(super().forward(x))


class Isht7(nn.Module):
    """`MS_Deeplab` at its full scale."""

    def __init__(self, blocks: tuple[int, ...], width: int, num_classes: int) -> None:
        super().__init__()
        self.Scale = Isht7ResNet(blocks, width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.Scale(x)


# --- kazuto1011/deeplab-pytorch: libs/models/resnet.py, deeplabv2.py, msc.py ------------------------------------------


class KazutoConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, dilation: int, relu: bool) -> None:
        super().__init__()
        self.add_module("conv", _conv(inputs, outputs, kernel, stride, dilation))
        self.add_module("bn", nn.BatchNorm2d(outputs, eps=1e-5, momentum=1 - 0.999))
        if relu:
            self.add_module("relu", nn.ReLU())


class KazutoBottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, first: bool, shortcut: str) -> None:
        super().__init__()
        middle = outputs // 4
        self.reduce = KazutoConv(inputs, middle, 1, stride, 1, True)
        self.conv3x3 = KazutoConv(middle, middle, 3, 1, dilation, True)
        self.increase = KazutoConv(middle, outputs, 1, 1, 1, False)
        self.shortcut_name = shortcut
        if first:
            setattr(self, shortcut, KazutoConv(inputs, outputs, 1, stride, 1, False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = getattr(self, self.shortcut_name, None)
        return F.relu(self.increase(self.conv3x3(self.reduce(x))) + (shortcut(x) if shortcut else x))


class KazutoASPP(nn.Module):
    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        for i, rate in enumerate(RATES):
            self.add_module(f"c{i}", _conv(inputs, num_classes, 3, 1, rate, True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(stage(x) for stage in self.children())


class OldKazutoASPP(nn.Module):
    """As it was until 2018."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.stages = KazutoASPP(inputs, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x)


class Kazuto(nn.Sequential):
    """`DeepLabV2`; `old`: names until 2018."""

    def __init__(self, blocks: tuple[int, ...], width: int, num_classes: int, *, old: bool = False) -> None:
        super().__init__()
        stem = nn.Sequential()
        stem.add_module("conv1", KazutoConv(3, width, 7, 2, 1, True))
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1, ceil_mode=True))
        self.add_module("layer1", stem)
        inputs = width
        for stage, (num, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            outputs, layer = width * 4 * 2**stage, nn.Sequential()
            for block in range(num):
                own = (stride if block == 0 else 1, dilation, block == 0, "proj" if old else "shortcut")
                layer.add_module(f"block{block + 1}", KazutoBottleneck(inputs, outputs, *own))
                inputs = outputs
            self.add_module(f"layer{stage + 2}", layer)
        self.add_module("aspp", (OldKazutoASPP if old else KazutoASPP)(inputs, num_classes))


# --- The authors' network as Caffe runs it: a list of layers ----------------------------------------------------------


@dataclass
class CaffeLayer:
    """A layer of a prototxt, with its blobs: convolution [weight, bias?], BatchNorm [mean, var, scale], Scale."""

    name: str
    type: str
    bottom: tuple[str, ...]
    top: str
    blobs: list[np.ndarray]
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    dilation: int = 1
    eps: float = 1e-5


def caffe_letters(num: int, stage: int, blocks: tuple[int, ...]) -> list[str]:
    """Block names of a stage: a, b, c of short ones and of ResNet-50, else a, b1, b2, ..."""
    numbered = blocks == BLOCKS_101 and stage in (3, 4)
    return ["a" if i == 0 else f"b{i}" if numbered else chr(ord("a") + i) for i in range(num)]


class CaffeNetBuilder:
    """Writes down the layers of the authors' `deploy.prototxt` with random blobs.

    form: `deeplab`, or `imagenet`, whose res4 and res5 stride instead of dilating and whose head is fc1000.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        num_classes: int,
        seed: int,
        *,
        form: str = "deeplab",
        stride_on_1x1: bool = True,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.layers: list[CaffeLayer] = []
        deeplab = form == "deeplab"
        self.conv_bn("conv1", "bn_conv1", "scale_conv1", "data", 3, width, kernel=7, stride=2)
        self.layers.append(CaffeLayer("conv1_relu", "ReLU", ("conv1",), "conv1", []))
        pad = 1 if deeplab else 0
        self.layers.append(CaffeLayer("pool1", "Pooling", ("conv1",), "pool1", [], kernel=3, stride=2, pad=pad))
        bottom, inputs = "pool1", width
        for stage, num in zip((2, 3, 4, 5), blocks, strict=True):
            middle = width * 2 ** (stage - 2)
            for i, letter in enumerate(caffe_letters(num, stage, blocks)):
                strided = i == 0 and (stage == 3 or (stage > 3 and not deeplab))
                stride = 2 if strided else 1
                dilation = {4: 2, 5: 4}.get(stage, 1) if deeplab else 1
                name = f"{stage}{letter}"
                shortcut = bottom
                if i == 0:
                    shortcut = self.branch(f"{name}_branch1", bottom, inputs, 4 * middle, stride=stride)
                own = {True: (stride, 1), False: (1, stride)}[stride_on_1x1]
                top = self.branch(f"{name}_branch2a", bottom, inputs, middle, stride=own[0], relu=True)
                top = self.branch(
                    f"{name}_branch2b", top, middle, middle, kernel=3, stride=own[1], dilation=dilation, relu=True
                )
                top = self.branch(f"{name}_branch2c", top, middle, 4 * middle)
                bottom, inputs = f"res{name}", 4 * middle
                self.layers.append(CaffeLayer(bottom, "Eltwise", (shortcut, top), bottom, []))
                self.layers.append(CaffeLayer(f"{bottom}_relu", "ReLU", (bottom,), bottom, []))
        if deeplab:
            for i, rate in enumerate(RATES):
                self.conv(f"fc1_voc12_c{i}", bottom, inputs, num_classes, kernel=3, dilation=rate, bias=True)
            heads = tuple(f"fc1_voc12_c{i}" for i in range(4))
            self.layers.append(CaffeLayer("fc1_voc12", "Eltwise", heads, "fc1_voc12", []))

    def conv(
        self, name: str, bottom: str, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, dilation: int = 1,
        bias: bool = False,
    ) -> None:  # fmt: skip
        weight = self.rng.normal(0, (inputs * kernel**2) ** -0.5, (outputs, inputs, kernel, kernel))
        blobs = [weight.astype(np.float32)] + ([self.rng.normal(0, 1, outputs).astype(np.float32)] if bias else [])
        pad = dilation * (kernel // 2)
        self.layers.append(CaffeLayer(name, "Convolution", (bottom,), name, blobs, kernel, stride, pad, dilation))

    def conv_bn(self, conv: str, bn: str, scale: str, bottom: str, inputs: int, outputs: int, **geometry: Any) -> None:
        self.conv(conv, bottom, inputs, outputs, **geometry)
        factor = self.rng.uniform(0.5, 900)
        mean, var = self.rng.normal(0, 0.3, outputs), self.rng.uniform(0.05, 1, outputs)
        blobs = [mean * factor, var * factor, np.array([factor])]
        self.layers.append(CaffeLayer(bn, "BatchNorm", (conv,), conv, [b.astype(np.float32) for b in blobs]))
        blobs = [self.rng.uniform(0.3, 0.9, outputs), self.rng.normal(0, 0.3, outputs)]
        self.layers.append(CaffeLayer(scale, "Scale", (conv,), conv, [b.astype(np.float32) for b in blobs]))

    def branch(self, name: str, bottom: str, inputs: int, outputs: int, *, relu: bool = False, **geometry: Any) -> str:
        self.conv_bn(f"res{name}", f"bn{name}", f"scale{name}", bottom, inputs, outputs, **geometry)
        if relu:
            self.layers.append(CaffeLayer(f"res{name}_relu", "ReLU", (f"res{name}",), f"res{name}", []))
        return f"res{name}"


def run_caffe(layers: list[CaffeLayer], image: torch.Tensor) -> Outputs:
    """Run a list of layers as Caffe does, and return each layer's output by its name, and the last as `logits`."""
    blobs, outputs = {"data": image}, {}
    for layer in layers:
        x = blobs[layer.bottom[0]]
        own = [torch.from_numpy(blob) for blob in layer.blobs]
        if layer.type == "Convolution":
            x = F.conv2d(x, own[0], own[1] if len(own) > 1 else None, layer.stride, layer.pad, layer.dilation)
        elif layer.type == "BatchNorm":
            mean, var = (blob / own[2] for blob in own[:2])
            x = (x - mean.view(1, -1, 1, 1)) / torch.sqrt(var.view(1, -1, 1, 1) + layer.eps)
        elif layer.type == "Scale":
            x = x * own[0].view(1, -1, 1, 1) + own[1].view(1, -1, 1, 1)
        elif layer.type == "Pooling":
            x = F.max_pool2d(x, layer.kernel, layer.stride, layer.pad, ceil_mode=True)
        elif layer.type == "ReLU":
            x = F.relu(x)
        else:
            x = sum(blobs[name] for name in layer.bottom)
        blobs[layer.top] = outputs[layer.name] = x
    outputs["logits"] = x
    return outputs


# --- DrSleep/tensorflow-deeplab-resnet: channels last, kernels [H, W, in, out], SAME padding --------------------------


def drsleep_variables(blocks: tuple[int, ...], width: int, num_classes: int, seed: int) -> Arrays:
    """The variables of `DeepLabResNetModel` with random values."""
    rng = np.random.default_rng(seed)
    variables: Arrays = {}

    def conv(name: str, kernel: int, inputs: int, outputs: int) -> None:
        values = rng.normal(0, (inputs * kernel**2) ** -0.5, (kernel, kernel, inputs, outputs))
        variables[f"{name}/weights"] = values.astype(np.float32)

    def norm(name: str, channels: int) -> None:
        variables[f"{name}/beta"] = rng.normal(0, 0.3, channels).astype(np.float32)
        variables[f"{name}/gamma"] = rng.uniform(0.3, 0.9, channels).astype(np.float32)
        variables[f"{name}/moving_mean"] = rng.normal(0, 0.3, channels).astype(np.float32)
        variables[f"{name}/moving_variance"] = rng.uniform(0.05, 1, channels).astype(np.float32)

    conv("conv1", 7, 3, width)
    norm("bn_conv1", width)
    inputs = width
    for stage, num in zip((2, 3, 4, 5), blocks, strict=True):
        middle = width * 2 ** (stage - 2)
        for i, letter in enumerate(caffe_letters(num, stage, blocks)):
            name = f"{stage}{letter}_branch"
            if i == 0:
                conv(f"res{name}1", 1, inputs, 4 * middle)
                norm(f"bn{name}1", 4 * middle)
            for part, kernel, own in (
                ("2a", 1, (inputs, middle)),
                ("2b", 3, (middle, middle)),
                ("2c", 1, (middle, 4 * middle)),
            ):
                conv(f"res{name}{part}", kernel, *own)
                norm(f"bn{name}{part}", own[1])
            inputs = 4 * middle
    for i in range(4):
        conv(f"fc1_voc12_c{i}", 3, inputs, num_classes)
        variables[f"fc1_voc12_c{i}/biases"] = rng.normal(0, 1, num_classes).astype(np.float32)
    return variables


def run_drsleep(variables: Arrays, blocks: tuple[int, ...], image: torch.Tensor, *, eps: float) -> Outputs:
    """Run the TensorFlow network on an image in torch's layout; outputs come back in torch's layout."""
    outputs: Outputs = {}

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(variables[name])

    def same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
        pads: list[int] = []
        for size in (x.shape[2], x.shape[1]):  # F.pad begins with the last axis but one: channels stay
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return F.pad(x, [0, 0, *pads], value=value)

    def conv(x: torch.Tensor, name: str, stride: int = 1, rate: int = 1) -> torch.Tensor:
        kernel = get(f"{name}/weights")
        x = same(x, (kernel.shape[0] - 1) * rate + 1, stride)
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), stride=stride, dilation=rate)
        outputs[name] = y
        return y.permute(0, 2, 3, 1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        inverse = torch.rsqrt(get(f"{name}/moving_variance") + eps) * get(f"{name}/gamma")
        y = x * inverse + (get(f"{name}/beta") - get(f"{name}/moving_mean") * inverse)
        outputs[name] = y.permute(0, 3, 1, 2)
        return y

    x = torch.relu(norm(conv(image.permute(0, 2, 3, 1), "conv1", 2), "bn_conv1"))
    x = F.max_pool2d(same(x, 3, 2, -torch.inf).permute(0, 3, 1, 2), 3, 2).permute(0, 2, 3, 1)
    for stage, num in zip((2, 3, 4, 5), blocks, strict=True):
        for i, letter in enumerate(caffe_letters(num, stage, blocks)):
            name, stride = f"{stage}{letter}_branch", 2 if (stage, i) == (3, 0) else 1
            shortcut = norm(conv(x, f"res{name}1", stride), f"bn{name}1") if i == 0 else x
            y = torch.relu(norm(conv(x, f"res{name}2a", stride), f"bn{name}2a"))
            y = torch.relu(norm(conv(y, f"res{name}2b", rate={4: 2, 5: 4}.get(stage, 1)), f"bn{name}2b"))
            x = torch.relu(shortcut + norm(conv(y, f"res{name}2c"), f"bn{name}2c"))
    scores = []
    for i, rate in enumerate(RATES):
        scores.append(conv(x, f"fc1_voc12_c{i}", rate=rate) + get(f"fc1_voc12_c{i}/biases"))
        outputs[f"fc1_voc12_c{i}"] = scores[-1].permute(0, 3, 1, 2)
    outputs["logits"] = sum(scores).permute(0, 3, 1, 2)
    return outputs
