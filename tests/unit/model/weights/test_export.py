"""What is written out works in other people's networks, and comes back as what it was."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_safetensors
from torch import nn

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE, TORCHVISION, Preprocessing
from dist_deeplab.model.weights import Variant, fit_weights, load_weights
from dist_deeplab.model.weights.export import FORMATS, export
from tests.unit.model.weights.networks import Kazuto, TorchvisionResNet, randomise

TINY = ((1, 1, 2, 1), 16)
CAFFE_VARIANT = Variant("anything", True, CAFFE, note="trained on val")
TORCH_VARIANT = Variant("something", False, TORCHVISION, contract_dilation=True)


def _net(variant: Variant, seed: int = 1) -> DeepLabV2:
    net = DeepLabV2("resnet_tiny", 3, norm=norm_factory("frozen"), **variant.geometry)
    randomise(net, seed)
    return net.eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 65, 41)


def _differs(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max()) > 1e-5 * float(theirs.detach().abs().max())


def test_kazutos_network_computes_the_same(tmp_path: Path, image: torch.Tensor) -> None:
    net = _net(CAFFE_VARIANT)
    assert export(net.state_dict(), CAFFE_VARIANT, tmp_path / "a.pth", to="kazuto1011") == []
    theirs = nn.Module()
    theirs.base = Kazuto(*TINY, 3)
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    assert not _differs(net(image), theirs.base.eval()(image))


@pytest.mark.parametrize("variant", [CAFFE_VARIANT, TORCH_VARIANT], ids=["caffe", "torchvision"])
def test_torchvisions_backbone_computes_the_same(tmp_path: Path, image: torch.Tensor, variant: Variant) -> None:
    net = _net(variant)
    notes = export(net.state_dict(), variant, tmp_path / "a.pth", to="torchvision")
    dilations = ((1, 2), (2, 4)) if variant.contract_dilation else ((2, 2), (4, 4))
    theirs = TorchvisionResNet(*TINY, dilations=dilations, with_fc=False)
    if variant.stride_on_1x1:
        assert any("layer2[0].conv1.stride to (2, 2)" in note for note in notes)
        theirs.layer2[0].conv1.stride, theirs.layer2[0].conv2.stride = (2, 2), (1, 1)
    theirs.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    assert not _differs(net.backbone(image), theirs.eval()(image))


def test_plain_files_hold_nothing_but_tensors_under_our_names(tmp_path: Path) -> None:
    state = _net(CAFFE_VARIANT).state_dict()
    export(state, CAFFE_VARIANT, tmp_path / "a.pth", to="state_dict")
    export(state, CAFFE_VARIANT, tmp_path / "a.safetensors", to="safetensors")
    for content in (torch.load(tmp_path / "a.pth", weights_only=True), load_safetensors(tmp_path / "a.safetensors")):
        assert content.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in content.items())
        _net(CAFFE_VARIANT, seed=2).load_state_dict(content)


@pytest.mark.parametrize(
    ("to", "variant"),
    [(to, CAFFE_VARIANT) for to in FORMATS] + [(to, TORCH_VARIANT) for to in FORMATS if to != "kazuto1011"],
)
def test_every_format_comes_back_as_what_it_was(tmp_path: Path, to: str, variant: Variant) -> None:
    net = _net(variant)
    export(net.state_dict(), variant, tmp_path / "a.out", to=to)
    weights = load_weights(tmp_path / "a.out")
    assert weights.variant == variant
    other = _net(variant, seed=2)
    fit_weights(other, weights, restore_last=True)
    for name, tensor in other.state_dict().items():
        if to != "torchvision" or name.startswith("backbone."):
            assert torch.equal(tensor, net.state_dict()[name]), name


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        (Variant("x", False, CAFFE), "stride on the 3x3"),
        (Variant("x", True, CAFFE, contract_dilation=True), "contract the dilation"),
    ],
)
def test_kazutos_names_are_refused_to_other_networks(tmp_path: Path, variant: Variant, reason: str) -> None:
    with pytest.raises(UserError, match=f"{reason}, which kazuto1011's network does not"):
        export(_net(variant).state_dict(), variant, tmp_path / "a.pth", to="kazuto1011")
    assert list(tmp_path.iterdir()) == []


def test_another_input_than_kazutos_is_said(tmp_path: Path) -> None:
    variant = Variant("x", True, Preprocessing("rgb", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0)))
    notes = export(_net(variant).state_dict(), variant, tmp_path / "a.pth", to="kazuto1011")
    assert "not kazuto1011's BGR minus the mean" in notes[0]


@pytest.mark.parametrize("to", ["state_dict", "safetensors"])
def test_a_disk_that_cannot_be_written_leaves_nothing(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*a\.out: No space left"):
        export(_net(CAFFE_VARIANT).state_dict(), CAFFE_VARIANT, tmp_path / "a.out", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [lambda m: {"": {"dist_deeplab": 3}}, lambda m: {"": {"dist_deeplab": {"family": 1}}}]
)
def test_a_variant_that_can_not_be_read_is_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    export(_net(CAFFE_VARIANT).state_dict(), CAFFE_VARIANT, tmp_path / "a.pth", to="state_dict")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    content._metadata = change(content._metadata)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="describes the network of its weights in a way that can't be read"):
        load_weights(tmp_path / "a.pth")
