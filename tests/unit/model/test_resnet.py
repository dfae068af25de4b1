"""The backbones have the prototxt's blocks, strides and dilations, and torchvision's names."""

import pytest
import torch
from torch import nn

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.resnet import SPECS, Bottleneck, DilatedResNet, ResNetSpec, feature_length


def _backbone(name: str, *, stride_on_1x1: bool = True) -> DilatedResNet:
    """A backbone without memory: only its structure counts."""
    with torch.device("meta"):
        return DilatedResNet(SPECS[name], stride_on_1x1=stride_on_1x1, norm=norm_factory("local"))


def _layers(backbone: DilatedResNet) -> list[nn.Sequential]:
    return [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]


@pytest.mark.parametrize(
    ("name", "blocks", "channels"),
    [("resnet101", [3, 4, 23, 3], 2048), ("resnet50", [3, 4, 6, 3], 2048), ("resnet_tiny", [1, 1, 2, 1], 512)],
)
def test_blocks_and_channels_are_those_of_the_network(name: str, blocks: list[int], channels: int) -> None:
    backbone = _backbone(name)
    assert [len(layer) for layer in _layers(backbone)] == blocks
    assert SPECS[name].out_channels == backbone.layer4[-1].conv3.out_channels == channels


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("stride_on_1x1", [True, False])
def test_only_res3_strides_and_res4_and_res5_dilate(name: str, stride_on_1x1: bool) -> None:
    expected = {"layer1": (1, 1), "layer2": (2, 1), "layer3": (1, 2), "layer4": (1, 4)}
    backbone = _backbone(name, stride_on_1x1=stride_on_1x1)
    for layer_name, (stride, dilation) in expected.items():
        for number, block in enumerate(getattr(backbone, layer_name)):
            assert isinstance(block, Bottleneck)
            own_stride = stride if number == 0 else 1
            strides = (block.conv1.stride[0], block.conv2.stride[0], block.conv3.stride[0])
            assert strides == ((own_stride, 1, 1) if stride_on_1x1 else (1, own_stride, 1))
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
            assert (block.downsample is not None) == (number == 0)
            if block.downsample is not None:
                assert block.downsample[0].stride == (own_stride, own_stride)


def test_names_are_torchvisions() -> None:
    own = set(_backbone("resnet101").state_dict())
    some = {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.running_var"}
    some |= {"layer3.22.conv3.weight", "layer3.22.bn3.bias", "layer4.2.bn1.num_batches_tracked"}
    assert some <= own
    # torchvision's resnet101: 104 convolutions and as many batch norms with 5 tensors each; its fc is not ours
    assert len(own) == 104 + 104 * 5


@pytest.mark.parametrize("stride_on_1x1", [True, False])
@torch.no_grad()
def test_feature_length_is_what_the_network_gives_at_any_size(stride_on_1x1: bool) -> None:
    thin = ResNetSpec((1, 1, 1, 1), width=2)
    backbone = DilatedResNet(thin, stride_on_1x1=stride_on_1x1, norm=norm_factory("local")).eval()
    for length in range(1, 100):
        features = backbone(torch.zeros(1, 3, length, 2 * length))
        assert features.shape == (1, 64, feature_length(length), feature_length(2 * length))


def test_a_length_of_8k_plus_1_has_a_feature_on_each_8th_pixel() -> None:
    assert [feature_length(8 * k + 1) for k in range(1, 200)] == [k + 1 for k in range(1, 200)]
