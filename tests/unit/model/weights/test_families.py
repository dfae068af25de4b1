"""Weights of every family, put into our network, give every layer's output of the family's own network.

The networks are 4 or 8 channels wide but have the depth, and so the names, of ResNet-50 and -101; one is of full width.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE, CAFFE_ROUNDED, TORCHVISION
from dist_deeplab.model.resnet import SPECS, ResNetSpec
from dist_deeplab.model.weights import backbone_of, fit_weights, load_weights
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import (
    BLOCKS_50,
    BLOCKS_101,
    BackboneAndHeads,
    CaffeLayer,
    CaffeNetBuilder,
    Isht7,
    Kazuto,
    Outputs,
    TorchvisionResNet,
    caffe_letters,
    drsleep_variables,
    outputs_of,
    randomise,
    run_caffe,
    run_drsleep,
)

WIDTH = 4
CLASSES = 5
MAX_DIFFERENCE = 1e-4  # relative to the largest value of the layer
BLOCKS = {"narrow101": BLOCKS_101, "narrow50": BLOCKS_50}
BRANCHES = {"conv1": "2a", "bn1": "2a", "conv2": "2b", "bn2": "2b", "conv3": "2c", "bn3": "2c"}


@pytest.fixture(autouse=True)
def narrow_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, blocks in BLOCKS.items():
        monkeypatch.setitem(SPECS, name, ResNetSpec(blocks, width=WIDTH))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 65, 57, generator=torch.Generator().manual_seed(5))


def load_into_ours(path: Path, classes: int = CLASSES) -> tuple[DeepLabV2, Any]:
    """Load a file as training does; our network starts from other random weights."""
    weights = load_weights(path)
    backbone = backbone_of(weights.tensors)
    assert backbone is not None
    torch.manual_seed(99)
    net = DeepLabV2(backbone, classes, norm=norm_factory("frozen"), **weights.variant.geometry)
    randomise(net, seed=1234)
    report = fit_weights(net, weights, restore_last=True)
    assert [name for name in report.missing if name.startswith("backbone.")] == []
    return net, weights


def first_difference(
    net: nn.Module, image: torch.Tensor, theirs: Outputs, name_of: Callable[[str], str], *, folded: int = 0
) -> str:
    """Name the first of our layers whose output is not theirs; empty if all are.

    folded: how many layers theirs lacks because another took over a part of them.
    """
    ours = outputs_of(net, image)
    checked = 0
    for name, output in ours.items():
        if name == "logits" or name_of(name) not in theirs:
            continue
        expected = theirs[name_of(name)]
        assert output.shape == expected.shape, name
        checked += 1
        if float((output - expected).abs().max()) > MAX_DIFFERENCE * float(expected.abs().max()):
            return name
    backbone = sum(
        isinstance(m, nn.Conv2d | nn.BatchNorm2d) for n, m in net.named_modules() if n.startswith("backbone")
    )
    assert checked >= backbone - folded, f"only {checked} of {backbone} layers were compared"
    if "logits" in theirs and theirs["logits"].shape == ours["logits"].shape:
        difference = (ours["logits"] - theirs["logits"]).abs().max() / theirs["logits"].abs().max()
        return "" if difference <= MAX_DIFFERENCE else "logits"
    return ""


def save(content: Any, folder: Path, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


# --- names of our layers in other networks, written the other way round than the package does -------------------------


def torchvision_layer(prefix: str) -> Callable[[str], str]:
    return lambda ours: prefix + ours.removeprefix("backbone.").replace("head.branches.", "layer5.conv2d_list.")


def kazuto_layer(shortcut: str, aspp: str) -> Callable[[str], str]:
    places = {"conv1": "reduce.conv", "bn1": "reduce.bn", "conv2": "conv3x3.conv", "bn2": "conv3x3.bn"}
    places |= {"conv3": "increase.conv", "bn3": "increase.bn"}
    places |= {"downsample.0": f"{shortcut}.conv", "downsample.1": f"{shortcut}.bn"}

    def name(ours: str) -> str:
        if ours.startswith("head"):
            return f"{aspp}c{ours[-1]}"
        if not ours.startswith("backbone.layer"):
            return f"layer1.conv1.{'conv' if 'conv' in ours else 'bn'}"
        _, stage, block, place = ours.split(".", 3)
        return f"layer{int(stage[-1]) + 1}.block{int(block) + 1}.{places[place]}"

    return name


def caffe_layer(blocks: tuple[int, ...], norm: str) -> Callable[[str], str]:
    def name(ours: str) -> str:
        if ours.startswith("head"):
            return f"fc1_voc12_c{ours[-1]}"
        if not ours.startswith("backbone.layer"):
            return "conv1" if "conv" in ours else f"{norm}_conv1"
        _, stage, block, place = ours.split(".", 3)
        number = int(stage[-1]) + 1
        letter = caffe_letters(blocks[number - 2], number, blocks)[int(block)]
        kind = "res" if "conv" in place or place == "downsample.0" else norm
        return f"{kind}{number}{letter}_branch{BRANCHES.get(place, '1')}"

    return name


# --- torchvision, timm, mmsegmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [BLOCKS_50, BLOCKS_101], ids=["resnet50", "resnet101"])
@pytest.mark.parametrize("counters", [True, False], ids=["v2", "v1_without_counters"])
def test_torchvision_and_timm_resnets(
    tmp_path: Path, image: torch.Tensor, blocks: tuple[int, ...], counters: bool
) -> None:
    theirs = TorchvisionResNet(blocks, WIDTH)
    randomise(theirs, seed=1)
    state = {k: v for k, v in theirs.state_dict().items() if counters or not k.endswith("num_batches_tracked")}
    net, weights = load_into_ours(save(state, tmp_path))
    assert (weights.variant.stride_on_1x1, weights.variant.preprocessing) == (False, TORCHVISION)
    assert weights.skipped.keys() == {"fc.weight", "fc.bias"}
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("")) == ""


def test_a_resnet101_of_full_width(tmp_path: Path) -> None:
    image = torch.randn(1, 3, 65, 65)
    theirs = TorchvisionResNet(BLOCKS_101, 64)
    randomise(theirs, seed=1)
    net, weights = load_into_ours(save(theirs.state_dict(), tmp_path))
    assert backbone_of(weights.tensors) == "resnet101"
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("")) == ""


@pytest.mark.parametrize(
    ("heads", "family"),
    [
        ({"classifier": nn.Conv2d(3, 3, 1), "aux_classifier": nn.Conv2d(3, 3, 1)}, "torchvision DeepLabV3 ResNet"),
        ({"decode_head": nn.Conv2d(3, 3, 1), "auxiliary_head": nn.Conv2d(3, 3, 1)}, "mmsegmentation ResNet"),
    ],
    ids=["torchvision", "mmsegmentation"],
)
def test_backbones_of_deeplabv3_dilate_their_first_blocks_by_half(
    tmp_path: Path, image: torch.Tensor, heads: dict[str, nn.Module], family: str
) -> None:
    theirs = BackboneAndHeads(TorchvisionResNet(BLOCKS_101, WIDTH, dilations=((1, 2), (2, 4)), with_fc=False), **heads)
    randomise(theirs, seed=2)
    content = {"meta": {"epoch": 3}, "state_dict": theirs.state_dict()}
    net, weights = load_into_ours(save(content, tmp_path))
    assert (weights.variant.family, weights.variant.preprocessing) == (family, TORCHVISION)
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("backbone.")) == ""


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.encoder.", "net.backbone.base."])
def test_a_prefix_changes_nothing(tmp_path: Path, image: torch.Tensor, prefix: str) -> None:
    theirs = TorchvisionResNet(BLOCKS_50, WIDTH)
    randomise(theirs, seed=3)
    state = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    net, _ = load_into_ours(save({"model": state}, tmp_path))
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("")) == ""


# --- isht7 and kazuto1011 ---------------------------------------------------------------------------------------------


def test_isht7(tmp_path: Path, image: torch.Tensor) -> None:
    theirs = Isht7(BLOCKS_101, WIDTH, CLASSES)
    randomise(theirs, seed=4)
    net, weights = load_into_ours(save(theirs.state_dict(), tmp_path))
    assert weights.variant.family == "isht7 DeepLab-v2"
    assert (weights.variant.stride_on_1x1, weights.variant.preprocessing) == (True, CAFFE_ROUNDED)
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("Scale.")) == ""


@pytest.mark.parametrize(("prefix", "old"), [("base.", False), ("", False), ("scale.", True), ("module.base.", False)])
def test_kazuto(tmp_path: Path, image: torch.Tensor, prefix: str, old: bool) -> None:
    theirs = Kazuto(BLOCKS_101, WIDTH, CLASSES, old=old)
    randomise(theirs, seed=5)
    state = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    net, weights = load_into_ours(save(state, tmp_path))
    assert weights.variant.family == "kazuto1011 DeepLab-v2"
    assert (weights.variant.stride_on_1x1, weights.variant.preprocessing) == (True, CAFFE_ROUNDED)
    name_of = kazuto_layer("proj" if old else "shortcut", "aspp.stages." if old else "aspp.")
    assert first_difference(net, image, outputs_of(theirs, image), name_of) == ""


def test_kazutos_coco_init_is_a_backbone_with_another_head(tmp_path: Path, image: torch.Tensor) -> None:
    theirs = Kazuto(BLOCKS_101, WIDTH, CLASSES)  # deeplabv1_resnet101-coco.pth: no prefix, and one 1x1 `fc`
    theirs.aspp = nn.Identity()
    theirs.add_module("fc", nn.Conv2d(32 * WIDTH, 91, 1))
    randomise(theirs, seed=15)
    net, weights = load_into_ours(save(theirs.state_dict(), tmp_path))
    assert weights.skipped.keys() == {"fc.weight", "fc.bias"}
    assert first_difference(net, image, outputs_of(theirs, image), kazuto_layer("shortcut", "aspp.")) == ""


# --- Caffe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v1", [False, True], ids=["V2", "V1"])
@pytest.mark.parametrize("blocks", [BLOCKS_50, BLOCKS_101], ids=["resnet50", "resnet101"])
def test_caffe_deeplab(tmp_path: Path, image: torch.Tensor, blocks: tuple[int, ...], v1: bool) -> None:
    layers = CaffeNetBuilder(blocks, WIDTH, CLASSES, seed=6).layers
    path = tmp_path / "train_iter_20000.caffemodel"
    path.write_bytes(writers.caffemodel(layers, v1=v1, training_list="voc12/list/train_aug.txt"))
    net, weights = load_into_ours(path)
    assert weights.variant.family == "Caffe DeepLab-v2"
    assert (weights.variant.stride_on_1x1, weights.variant.preprocessing) == (True, CAFFE)
    assert weights.variant.note == ""
    assert first_difference(net, image, run_caffe(layers, image), caffe_layer(blocks, "scale")) == ""


def test_shared_copies_of_a_multi_scale_caffemodel_are_skipped(tmp_path: Path, image: torch.Tensor) -> None:
    layers = CaffeNetBuilder(BLOCKS_50, WIDTH, CLASSES, seed=6).layers
    other = CaffeNetBuilder(BLOCKS_50, WIDTH, CLASSES, seed=7).layers  # so that taking them would be noticed
    copies = []
    for layer in other:
        name = re.sub(r"^(fc1_voc12)(.*)$", r"\1_res075\2", layer.name)
        name = name if name != layer.name else f"{name}_res05"
        copies.append(CaffeLayer(**{**vars(layer), "name": name}))
    path = tmp_path / "a.caffemodel"
    path.write_bytes(writers.caffemodel(layers + copies))
    net, weights = load_into_ours(path)
    assert set(weights.skipped.values()) == {"the same layer at another scale"}
    assert first_difference(net, image, run_caffe(layers, image), caffe_layer(BLOCKS_50, "scale")) == ""


@pytest.mark.parametrize("stride_on_1x1", [True, False])
def test_caffe_imagenet_networks_are_dilated_here(tmp_path: Path, stride_on_1x1: bool) -> None:
    imagenet = CaffeNetBuilder(BLOCKS_101, WIDTH, 0, seed=8, form="imagenet", stride_on_1x1=stride_on_1x1).layers
    path = tmp_path / "ResNet-101-model.caffemodel"
    path.write_bytes(writers.caffemodel(imagenet))
    net, weights = load_into_ours(path)
    assert weights.variant.family == "Caffe ResNet (ImageNet)"
    assert weights.variant.stride_on_1x1 is stride_on_1x1
    # Up to res3 nothing is dilated; pool1 pads otherwise, so its features are compared from the same input on.
    dilated = CaffeNetBuilder(BLOCKS_101, WIDTH, CLASSES, seed=8, stride_on_1x1=stride_on_1x1).layers
    image = torch.randn(1, 3, 65, 65)
    assert first_difference(net, image, run_caffe(dilated, image), caffe_layer(BLOCKS_101, "scale")) == "logits"


def test_a_bias_before_a_batch_norm_is_folded_into_its_mean(tmp_path: Path, image: torch.Tensor) -> None:
    layers = CaffeNetBuilder(BLOCKS_50, WIDTH, CLASSES, seed=9).layers  # as conv1 of the authors' ResNet-50 has
    layers[0].blobs.append(np.array([3.0, -2.0, 1.0, 0.5], dtype=np.float32))
    path = tmp_path / "a.caffemodel"
    path.write_bytes(writers.caffemodel(layers))
    net, _ = load_into_ours(path)
    theirs = run_caffe(layers, image)
    del theirs["conv1"]
    assert first_difference(net, image, theirs, caffe_layer(BLOCKS_50, "scale"), folded=1) == ""


# --- DrSleep ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["V2_index", "V2_prefix", "V2_data", "V1", "npy"])
def test_drsleep(tmp_path: Path, image: torch.Tensor, form: str) -> None:
    variables = drsleep_variables(BLOCKS_101, WIDTH, CLASSES, seed=10)
    saved = variables | {"conv1/weights/Momentum": variables["conv1/weights"], "global_step": np.zeros(())}
    if form == "npy":
        path = tmp_path / "net.npy"
        np.save(path, writers.kaffe_dictionary(variables), allow_pickle=True)
    elif form == "V1":
        path = writers.write_v1(saved, tmp_path / "init.ckpt")
    else:
        index = writers.write_bundle(saved, tmp_path / "model.ckpt-20000")
        endings = {"V2_index": ".index", "V2_prefix": "", "V2_data": ".data-00000-of-00001"}
        path = index.with_name(f"model.ckpt-20000{endings[form]}")
    net, weights = load_into_ours(path)
    assert (weights.variant.stride_on_1x1, weights.variant.preprocessing) == (True, CAFFE)
    assert weights.skipped.keys() == (set() if form == "npy" else {"conv1/weights/Momentum", "global_step"})
    theirs = run_drsleep(variables, BLOCKS_101, image, eps=1e-3)
    assert first_difference(net, image, theirs, caffe_layer(BLOCKS_101, "bn")) == ""
    assert first_difference(
        net, image, run_drsleep(variables, BLOCKS_101, image, eps=1e-5), caffe_layer(BLOCKS_101, "bn")
    )


def test_the_first_kaffe_has_caffes_epsilon(tmp_path: Path, image: torch.Tensor) -> None:
    variables = drsleep_variables(BLOCKS_50, WIDTH, CLASSES, seed=11)
    np.save(tmp_path / "a.npy", writers.kaffe_dictionary(variables, writers.ORIGINAL_KAFFE), allow_pickle=True)
    net, _ = load_into_ours(tmp_path / "a.npy")
    theirs = run_drsleep(variables, BLOCKS_50, image, eps=1e-5)
    assert first_difference(net, image, theirs, caffe_layer(BLOCKS_50, "bn")) == ""


# --- the comparison itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("swapped", "first"),
    [
        (("layer4.1.conv2.weight", "layer4.2.conv2.weight"), "backbone.layer4.1.conv2"),
        (("layer3.21.bn3.running_var", "layer3.22.bn3.running_var"), "backbone.layer3.21.bn3"),
        (("layer1.0.bn1.running_mean", "layer1.0.bn1.bias"), "backbone.layer1.0.bn1"),
    ],
)
def test_two_swapped_tensors_are_noticed_and_their_layer_is_named(
    tmp_path: Path, image: torch.Tensor, swapped: tuple[str, str], first: str
) -> None:
    theirs = TorchvisionResNet(BLOCKS_101, WIDTH)
    randomise(theirs, seed=12)
    state = theirs.state_dict()
    state |= {swapped[0]: state[swapped[1]], swapped[1]: state[swapped[0]]}
    net, _ = load_into_ours(save(state, tmp_path))
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("")) == first


def test_random_weights_do_not_pass(image: torch.Tensor) -> None:
    theirs = TorchvisionResNet(BLOCKS_101, WIDTH)
    randomise(theirs, seed=13)
    net = DeepLabV2("narrow101", CLASSES, norm=norm_factory("frozen"), stride_on_1x1=False)
    randomise(net, seed=14)
    assert first_difference(net, image, outputs_of(theirs, image), torchvision_layer("")) == "backbone.conv1"
