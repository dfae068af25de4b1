"""Weights are recognised by what they hold, bring their preprocessing, and never load by halves or run code."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.model.preprocessing import CAFFE, TORCHVISION, Preprocessing
from dist_deeplab.model.weights import SCRATCH, Variant, Weights, fit_weights, load_file, load_weights


def _net(num_classes: int = 5, *, backbone: str = "resnet_tiny", seed: int = 0) -> DeepLabV2:
    torch.manual_seed(seed)
    return DeepLabV2(backbone, num_classes, norm=norm_factory("local"))


def _empty_net(backbone: str, num_classes: int = 21) -> DeepLabV2:
    """A large network without memory, where only names and shapes count."""
    with torch.device("meta"):
        return DeepLabV2(backbone, num_classes, norm=norm_factory("local"))


def _state(net: DeepLabV2) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def _torchvision_state(net: DeepLabV2) -> dict[str, torch.Tensor]:
    """What torchvision saves: bare backbone names and a classifier of 1000 ImageNet classes."""
    fc = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    return {**net.backbone.state_dict(), **fc}


def _checkpoint(net: DeepLabV2, variant: Variant = SCRATCH) -> dict[str, Any]:
    return {"format": "dist_deeplab.checkpoint/1", "variant": variant.to_plain(), "model": net.state_dict()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "weights.pt")
        return tmp_path / "weights.pt"

    return save


# --- known families ---------------------------------------------------------------------------------------------------


def test_torchvision_weights_bring_stride_on_the_3x3_and_rgb_preprocessing(save: Callable[[Any], Path]) -> None:
    weights = load_weights(save(_torchvision_state(_net())))
    assert weights.variant.stride_on_1x1 is False
    assert weights.variant.preprocessing == TORCHVISION
    assert TORCHVISION.channels == "rgb"


def test_torchvision_weights_fill_the_backbone_and_leave_the_head(save: Callable[[Any], Path]) -> None:
    source, net = _net(seed=1), _net(seed=2)
    before = _state(net)
    sentence = str(fit_weights(net, load_weights(save(_torchvision_state(source))), restore_last=True))
    for name, tensor in net.state_dict().items():
        expected = source.state_dict() if name.startswith("backbone.") else before
        assert torch.equal(tensor, expected[name]), name
    assert "the last layer starts random" in sentence
    assert not torch.equal(before["backbone.conv1.weight"], net.state_dict()["backbone.conv1.weight"])


def test_old_torchvision_files_without_batch_counters_load_whole(save: Callable[[Any], Path]) -> None:
    source, net = _net(seed=1), _net(seed=2)
    state = {k: v for k, v in _torchvision_state(source).items() if not k.endswith("num_batches_tracked")}
    sentence = str(fit_weights(net, load_weights(save(state)), restore_last=True))
    wanted = sum(1 for name in state if not name.startswith("fc."))
    assert f"{wanted} of {wanted} backbone tensors" in sentence


def test_own_checkpoints_fill_everything_and_keep_their_variant(save: Callable[[Any], Path]) -> None:
    variant = Variant("anything", True, Preprocessing("rgb", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    source, net = _net(seed=1), _net(seed=2)
    weights = load_weights(save(_checkpoint(source, variant)))
    assert weights.variant == variant
    sentence = str(fit_weights(net, weights, restore_last=True))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert "8 of 8 of the last layer" in sentence
    assert "random" not in sentence.partition(")")[2]


@pytest.mark.parametrize("variant", [SCRATCH, Variant("torchvision ResNet", False, TORCHVISION)])
def test_a_variant_survives_the_way_through_plain_values(variant: Variant) -> None:
    plain = variant.to_plain()
    plain["preprocessing"] = {k: list(v) if k != "channels" else v for k, v in plain["preprocessing"].items()}
    assert Variant.from_plain(plain) == variant


def test_random_weights_are_the_papers_network() -> None:
    assert SCRATCH.stride_on_1x1 is True
    assert SCRATCH.preprocessing == CAFFE


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_another_class_count_names_the_key_that_helps_and_changes_nothing() -> None:
    weights = Weights("a.pt", SCRATCH, _state(_net(7, seed=1)))
    net = _net(5)
    before = _state(net)
    with pytest.raises(UserError, match=r"7 classes.*5.*model\.restore_last=false"):
        fit_weights(net, weights, restore_last=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("classes", [5, 7])
def test_restore_last_false_keeps_the_networks_own_head(classes: int) -> None:
    source, net = _net(classes, seed=1), _net(5, seed=2)
    before = _state(net)
    sentence = str(fit_weights(net, Weights("a.pt", SCRATCH, _state(source)), restore_last=False))
    for name, tensor in net.state_dict().items():
        expected = before if name.startswith("head.") else source.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert "the last layer starts random" in sentence


@pytest.mark.parametrize(
    ("file", "model"),
    [("resnet50", "resnet101"), ("resnet101", "resnet50"), ("resnet_tiny", "resnet101"), ("resnet101", "resnet_tiny")],
)
def test_weights_of_another_backbone_are_refused(file: str, model: str) -> None:
    weights = Weights("a.pt", SCRATCH, _empty_net(file).state_dict())
    with pytest.raises(UserError, match=rf"it looks like {file}: set model\.backbone={file}"):
        fit_weights(_empty_net(model), weights, restore_last=False)


def test_a_backbone_with_many_tensors_missing_is_refused_and_one_of_them_named() -> None:
    state = {name: tensor for name, tensor in _state(_net()).items() if not name.startswith("backbone.layer3.1.")}
    with pytest.raises(UserError, match=r"lacks .* backbone\.layer3\.1\."):
        fit_weights(_net(), Weights("a.pt", SCRATCH, state), restore_last=True)


@pytest.mark.parametrize(
    "content", [{}, {"conv1.weight": torch.zeros(1)}, {"state_dict": {}}, [1, 2], torch.zeros(3), 7, None]
)
def test_an_unknown_family_is_refused_and_the_known_ones_named(save: Callable[[Any], Path], content: Any) -> None:
    with pytest.raises(UserError, match=r"no known family; .*known: .*torchvision"):
        load_weights(save(content))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights file at .*absent\.pt"):
        load_weights(tmp_path / "absent.pt")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, not weights"):
        load_weights(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(save: Callable[[Any], Path], share: float) -> None:
    path = save(_checkpoint(_net()))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"weights\.pt"):
        load_weights(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | st.binary(max_size=40).map(lambda tail: b"\x80\x02" + tail))
def test_no_content_whatever_leads_to_another_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"noise\.pt"):
        load_file(path)


class _Bomb:
    """Unpickles by calling a function."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.crater,)


@pytest.mark.parametrize(
    ("plain_pickle", "sentence"),
    [(False, "holds more than tensors and plain values"), (True, "is a pickle that torch[.]save did not write")],
)
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, plain_pickle: bool, sentence: str) -> None:
    path, crater = tmp_path / "weights.pt", tmp_path / "crater"
    content = {"conv1.weight": torch.zeros(1), "bomb": _Bomb(crater)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"weights\.pt .*{sentence}"):
        load_weights(path)
    assert not crater.exists()
    torch.load(path, weights_only=False) if not plain_pickle else pickle.loads(path.read_bytes())
    assert crater.exists()  # the bomb was live
