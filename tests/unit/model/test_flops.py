"""Arithmetic is counted from shapes: a reference that adds up the convolutions by hand, and the known total."""

import pytest
import torch
from torch import nn

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import ASPP, DeepLabV2, MultiScale
from dist_deeplab.model.flops import peak_flops, training_flops


def by_hand(model: MultiScale, size: int) -> int:
    """2 x multiply-adds of each convolution: once forward, once for weights, once for inputs (not the image's)."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        for conv in module.branches if isinstance(module, ASPP) else [module]:
            kernel = conv.kernel_size[0] * conv.kernel_size[1]
            forward = 2 * output.numel() * conv.in_channels * kernel
            total += forward * (2 if conv.in_channels == 3 else 3)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | ASPP)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("scales", [(), (1.0, 0.5)])
def test_flops_equal_a_count_by_hand(scales: tuple[float, ...]) -> None:
    model = MultiScale(DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync")), scales)
    assert training_flops(model, (65, 65)) == by_hand(model, 65)


def test_resnet101_takes_450_gflop_a_crop_of_321() -> None:
    model = MultiScale(DeepLabV2("resnet101", 21, norm=norm_factory("frozen")))
    assert training_flops(model, (321, 321)) == pytest.approx(450e9, rel=0.002)


def test_counting_leaves_the_model_alone() -> None:
    model = MultiScale(DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync"))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training_flops(model, (65, 65))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA L40S", "fp16", 362.0),
        ("NVIDIA L4", "fp16", 121.0),
        ("NVIDIA A10G", "fp16", None),
        ("Some GPU of next year", "bf16", None),
    ],
)
def test_a_gpu_is_known_by_its_name_or_not_at_all(name: str, dtype: str, tflops: float | None) -> None:
    assert peak_flops(name, dtype) == (None if tflops is None else tflops * 1e12)
