"""The baselines of `step`: the network and the two training loops that others write."""

import contextlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import EPS, FrozenBatchNorm
from dist_deeplab.model.deeplabv2 import ASPP, DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.optim import build_optimizer

IGNORE_LABEL = 255


class PlainASPP(ASPP):
    """The four dilated convolutions one after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes, H, W]."""
        first, second, third, fourth = (branch(x) for branch in self.branches)
        return first + second + third + fourth


class PlainFrozenBatchNorm(nn.BatchNorm2d):
    """A pass of its own over the activations; not a FrozenBatchNorm, which goes into the convolution."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [B, C, H, W]."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def plain_network(net: DeepLabV2, backbone: str) -> DeepLabV2:
    """A network that computes the same with torch's layers alone, with weights of its own."""
    frozen = any(isinstance(module, FrozenBatchNorm) for module in net.modules())
    branch = net.head.branches[0]
    assert isinstance(branch, nn.Conv2d)
    num_classes, channels = branch.out_channels, branch.in_channels
    plain = DeepLabV2(backbone, num_classes, norm=partial(PlainFrozenBatchNorm if frozen else nn.BatchNorm2d, eps=EPS))
    plain.head = PlainASPP(channels, num_classes)
    plain.load_state_dict(net.state_dict())
    for mine, theirs in zip(plain.parameters(), net.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return plain


@contextlib.contextmanager
def flags(*, benchmark: bool, tf32_matmul: bool, tf32_conv: bool) -> Iterator[None]:
    """Set torch's global switches for one competitor, and put them back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32
    cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32 = benchmark, tf32_matmul, tf32_conv
    try:
        yield
    finally:
        cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32 = before


def with_peers_defaults() -> contextlib.AbstractContextManager[None]:
    """torch's defaults (convolutions in tf32 where a GPU has it), and cuDNN's benchmark, which peers switch on."""
    return flags(benchmark=True, tf32_matmul=False, tf32_conv=True)


def plain_ddp(model: nn.Module, env: DistEnv) -> nn.Module:
    """The model as peers wrap it, where there are other ranks."""
    return DistributedDataParallel(model) if env.world_size > 1 else model


class PeersLoop:
    """Forward, backward and the loss read back, micro-batch by micro-batch; then the update."""

    memory_format, label_dtype = torch.contiguous_format, torch.uint8

    def __init__(self, net: DeepLabV2, batches: list[Batch], env: DistEnv) -> None:
        net = net.to(env.device, memory_format=self.memory_format).train()  # type: ignore[call-overload]
        self.net, self.device = plain_ddp(net, env), env.device
        self.optimizer = unfused(build_optimizer(net, OptimConfig()), foreach=None)
        mean = torch.tensor(CAFFE.mean).view(1, 3, 1, 1)
        images = [(b.image.flip(1).float() - mean).contiguous(memory_format=self.memory_format) for b in batches]
        self.batches = list(zip(images, [b.label.to(self.label_dtype) for b in batches]))

    def __call__(self) -> float:
        with with_peers_defaults():
            self.optimizer.zero_grad()
            total = 0.0
            for image, label in self.batches:
                loss = self.loss(image.to(self.device), label) / len(self.batches)
                loss.backward()
                total += loss.item()
            self.optimizer.step()
            return total

    def loss(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of images on the device and labels on the CPU."""
        raise NotImplementedError


class Fp32Eager(PeersLoop):
    """The loop of most DeepLab repositories: the labels are made as small as the logits, on the CPU."""

    def loss(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = self.net(image)
        resized = [Image.fromarray(one.numpy()).resize(logits.shape[:1:-1], Image.Resampling.NEAREST) for one in label]
        target = torch.from_numpy(np.stack([np.asarray(one) for one in resized])).long().to(self.device)
        return F.cross_entropy(logits, target, ignore_index=IGNORE_LABEL)


class AmpChannelsLast(PeersLoop):
    """The mixed-precision loop of torchvision's segmentation reference, in bf16: the logits are made large."""

    memory_format, label_dtype = torch.channels_last, torch.int64

    def loss(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        target = label.to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = F.interpolate(self.net(image), size=target.shape[1:], mode="bilinear", align_corners=False)
            return F.cross_entropy(logits, target, ignore_index=IGNORE_LABEL)


def unfused(optimizer: Optimizer, *, foreach: bool | None) -> Optimizer:
    """The same SGD in torch's other implementations; None: the one torch would choose."""
    keys = ("params", "lr", "weight_decay", "momentum")
    return SGD([{key: group[key] for key in keys} | _named(group) for group in optimizer.param_groups], foreach=foreach)


def _named(group: dict[str, object]) -> dict[str, object]:
    return {"name": group["name"], "lr_mult": group["lr_mult"]}
