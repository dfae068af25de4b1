"""State dicts that can't be ours are told apart, contaminated files marked, and what went where is reported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.weights import SCRATCH, Variant, Weights, fit_weights, load_weights
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import (
    BackboneAndHeads,
    CaffeNetBuilder,
    Isht7,
    Kazuto,
    TorchvisionResNet,
    drsleep_variables,
    randomise,
)

TINY = ((1, 1, 2, 1), 16)


def _net(classes: int = 3) -> DeepLabV2:
    torch.manual_seed(0)
    return DeepLabV2("resnet_tiny", classes, norm=norm_factory("frozen"))


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(content: Any, name: str = "a.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def _state(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = TorchvisionResNet(*TINY).state_dict()
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    return state


# --- networks that ours can't be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (_state(conv1__weight=None) | {"conv1.0.weight": torch.zeros(8, 3, 3, 3)}, "deep stem"),  # timm resnet101d
        (_state(conv1__weight=None) | {"stem.0.weight": torch.zeros(8, 3, 3, 3)}, "deep stem"),  # mmseg ResNetV1c
        ({k: v for k, v in _state().items() if "conv3" not in k}, "basic blocks"),
        (_state(layer1__0__conv2__weight=torch.zeros(16, 4, 3, 3)), "grouped convolutions"),
        (_state(layer1__0__conv1__weight=torch.zeros(32, 16, 1, 1)), "wide bottlenecks"),
    ],
    ids=["resnet101d", "ResNetV1c", "resnet18", "resnext", "wide"],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_other_resnets_are_called_what_they_are(
    save: Callable[..., Path], state: dict[str, torch.Tensor], reason: str, prefix: str
) -> None:
    with pytest.raises(UserError, match=f"{reason}.*use a plain ResNet-50 or -101"):
        load_weights(save({f"{prefix}{name}": tensor for name, tensor in state.items()}))


def test_tensors_without_a_place_are_refused(save: Callable[..., Path]) -> None:
    state = _state() | {"layer1.0.se.fc1.weight": torch.zeros(4, 64, 1, 1)}  # timm seresnet50
    with pytest.raises(UserError, match=r"no place for, e\.g\. backbone\.layer1\.0\.se\.fc1\.weight"):
        fit_weights(_net(), load_weights(save(state)), restore_last=False)


def test_the_nearest_family_is_named(save: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"no known family; the nearest is torchvision ResNet, which .* resemble"):
        load_weights(save(_state(bn1__running_mean=None)))
    kazuto = {k: v for k, v in Kazuto(*TINY, 3).state_dict().items() if not k.startswith("layer1")}
    with pytest.raises(UserError, match=r"the nearest is kazuto1011 DeepLab-v2, which .* resemble"):
        load_weights(save(kazuto))
    with pytest.raises(UserError, match=r"of no known family; its names begin with features\.0\.weight"):
        load_weights(save({"features.0.weight": torch.zeros(3)}))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": torch.tensor(3), "state_dict": state, "optimizer": {"state": {}}},
        lambda state: {"model": {"module": state}, "best_acc": 0.7},
        lambda state: {"net": {f"module.{name}": tensor.half() for name, tensor in state.items()}},
    ],
)
def test_a_state_dict_is_found_where_scripts_put_it(save: Callable[..., Path], wrap: Callable[[Any], Any]) -> None:
    report = fit_weights(_net(), load_weights(save(wrap(_state()))), restore_last=True)
    assert report.family == "torchvision ResNet"
    assert not [name for name in report.missing if name.startswith("backbone.")]


def test_two_networks_in_one_file_are_refused(save: Callable[..., Path]) -> None:
    state = _state()
    both = {f"student.{k}": v for k, v in state.items()} | {f"teacher.{k}": v for k, v in state.items()}
    with pytest.raises(UserError, match=r"holds 2 networks, under 'student\.', 'teacher\.'"):
        load_weights(save(both))


def test_a_bare_state_dict_of_ours_is_refused_since_it_hides_its_input(save: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="does not say what input its network wants"):
        load_weights(save(_net().state_dict()))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("conv1.weight", float("nan"), r"conv1\.weight in .* holds NaN or infinity"),
        ("layer1.0.bn1.bias", float("inf"), "holds NaN or infinity"),
        ("layer1.0.bn1.running_var", -1.0, r"layer1\.0\.bn1\.running_var in .* holds negative variances"),
    ],
)
def test_values_that_would_ruin_a_run_are_refused(
    save: Callable[..., Path], name: str, value: float, sentence: str
) -> None:
    state = _state()
    state[name].view(-1)[1] = value
    net = _net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=sentence):
        fit_weights(net, load_weights(save(state)), restore_last=True)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_half_of_a_last_layer_is_refused(save: Callable[..., Path]) -> None:
    state = {k: v for k, v in Isht7(*TINY, 3).state_dict().items() if "conv2d_list.2" not in k}
    weights = load_weights(save(state))
    with pytest.raises(UserError, match=r"lacks head\.branches\.2\.weight; set model\.restore_last=false"):
        fit_weights(_net(), weights, restore_last=True)
    fit_weights(_net(), weights, restore_last=False)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_was_loaded_renamed_skipped_and_missing(save: Callable[..., Path]) -> None:
    theirs = BackboneAndHeads(TorchvisionResNet(*TINY, with_fc=False), decode_head=nn.Conv2d(3, 3, 1))
    state = theirs.state_dict()
    del state["backbone.layer3.1.bn2.bias"]
    report = fit_weights(_net(), load_weights(save(state)), restore_last=True)
    assert "backbone.layer3.1.bn2.bias" in report.missing
    assert "head.branches.0.weight" in report.missing
    assert report.loaded["backbone.conv1.weight"] == "backbone.conv1.weight"
    assert report.skipped == {f"decode_head.{p}": "not part of our network" for p in ("weight", "bias")}
    sentence = str(report)
    num = report.num_backbone
    assert f"(mmsegmentation ResNet): {num - 1} of {num} backbone tensors, 0 of 8 of the last layer" in sentence
    assert "2 skipped (decode_head.weight, decode_head.bias)" in sentence
    assert "missing and random: backbone.layer3.1.bn2.bias" in sentence
    assert "the last layer starts random" in sentence
    assert "missing  backbone.layer3.1.bn2.bias" in list(report.lines())


def test_renamed_tensors_are_counted_and_listed(save: Callable[..., Path]) -> None:
    theirs = Kazuto(*TINY, 3)
    report = fit_weights(_net(), load_weights(save(theirs.state_dict())), restore_last=True)
    assert "loaded   backbone.layer2.0.conv2.weight <- layer3.block1.conv3x3.conv.weight" in list(report.lines())
    assert f"{len(theirs.state_dict())} renamed" in str(report)
    assert report.missing == ()
    left = fit_weights(_net(7), load_weights(save(theirs.state_dict())), restore_last=False)
    assert left.skipped["aspp.c0.weight"] == "model.restore_last=false"


# --- trained on val ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_marked"),
    [
        ("train2_iter_20000.caffemodel", True),
        ("train_iter_20000.caffemodel", False),
        ("init.caffemodel", False),
        ("deeplabv2_resnet101_msc-vocaug.pth", True),
        ("deeplabv2_resnet101_msc-vocaug-20000.pth", False),
        ("deeplab_resnet.ckpt", True),
        ("deeplab_resnet_init.ckpt", False),
    ],
)
def test_public_files_trained_on_val_are_marked(tmp_path: Path, name: str, is_marked: bool) -> None:
    path = tmp_path / name
    if name.endswith(".caffemodel"):
        path.write_bytes(writers.caffemodel(CaffeNetBuilder((1, 1, 2, 1), 2, 3, seed=0).layers))
    elif name.endswith(".ckpt"):
        writers.write_v1(drsleep_variables((1, 1, 2, 1), 2, 3, seed=0), path)
    else:
        torch.save(Kazuto((1, 1, 2, 1), 2, 3).state_dict(), path)
    variant = load_weights(path).variant
    assert ("trained on VOC 2012 val too" in variant.note) is is_marked
    assert Variant.from_plain(variant.to_plain()) == variant


@pytest.mark.parametrize(
    ("training_list", "is_marked"),
    [
        ("voc12/list/trainval_aug.txt", True),
        ("/home/valentin/voc12/list/train_aug.txt", False),
        ("coco/list/trainval.txt", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("v1", [False, True])
def test_a_caffemodel_tells_its_training_images(tmp_path: Path, training_list: str, is_marked: bool, v1: bool) -> None:
    layers = CaffeNetBuilder((1, 1, 2, 1), 2, 3, seed=0).layers
    (tmp_path / "renamed.caffemodel").write_bytes(writers.caffemodel(layers, v1=v1, training_list=training_list))
    note = load_weights(tmp_path / "renamed.caffemodel").variant.note
    assert ("trainval_aug.txt" in note) is is_marked


def test_the_note_is_in_the_report() -> None:
    weights = Weights("a.pth", replace(SCRATCH, note="trained on val"), _net().state_dict())
    assert str(fit_weights(_net(), weights, restore_last=True)).endswith("; trained on val")


def test_a_contracted_variant_is_another_network() -> None:
    torch.manual_seed(0)
    nets = [DeepLabV2("resnet_tiny", 3, norm=norm_factory("frozen"), contract_dilation=c) for c in (False, True)]
    for net in nets:
        randomise(net, seed=1)
    image = torch.randn(1, 3, 65, 65)
    assert not torch.allclose(nets[0].eval()(image), nets[1].eval()(image))
