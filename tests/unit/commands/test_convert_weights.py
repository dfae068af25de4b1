"""convert-weights: any known family in, four formats out, nothing half or silently random."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint, read_checkpoint
from dist_deeplab.commands import convert_weights
from dist_deeplab.data import voc
from dist_deeplab.evaluation.inference import load_network
from dist_deeplab.model.weights import load_weights
from tests.networks import checkpoint_of, discerning_network, write_checkpoint
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import (
    CaffeNetBuilder,
    Kazuto,
    TorchvisionResNet,
    outputs_of,
    randomise,
    run_caffe,
)

TINY = ((1, 1, 2, 1), 16)


@pytest.fixture
def convert() -> Any:
    return convert_weights.main


@pytest.fixture
def caffemodel(tmp_path: Path) -> Path:
    path = tmp_path / "train_iter_20000.caffemodel"
    path.write_bytes(writers.caffemodel(CaffeNetBuilder(*TINY, 3, seed=0).layers))
    return path


def test_a_caffemodel_becomes_kazutos_network(
    convert: Any, caffemodel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert([str(caffemodel), str(tmp_path / "a.pth"), "--to", "kazuto1011", "--report"]) == 0
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    theirs = Kazuto(*TINY, 3)
    theirs.load_state_dict({name.removeprefix("base."): tensor for name, tensor in state.items()})
    image = torch.randn(1, 3, 65, 65)
    logits = run_caffe(CaffeNetBuilder(*TINY, 3, seed=0).layers, image)["logits"]
    assert torch.allclose(outputs_of(theirs, image)["logits"], logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))
    printed = capsys.readouterr().out
    assert "loaded   backbone.conv1.weight <- conv1/weight" in printed
    assert "(Caffe DeepLab-v2)" in printed


def test_a_conversion_chain_loses_nothing(convert: Any, caffemodel: Path, tmp_path: Path) -> None:
    source = caffemodel
    for to in ("state_dict", "safetensors", "kazuto1011", "state_dict"):
        target = tmp_path / f"{to}.{source.name[:4]}"
        assert convert([str(source), str(target), "--to", to]) == 0
        source = target
    first, last = load_weights(caffemodel), load_weights(source)
    assert last.variant == first.variant
    assert all(torch.equal(tensor, last.tensors[name]) for name, tensor in first.tensors.items())


def test_backbones_go_out_without_a_random_head(
    convert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = TorchvisionResNet(*TINY)
    randomise(net, seed=1)
    torch.save(net.state_dict(), tmp_path / "in.pth")
    assert convert([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 0
    assert not any(name.startswith("head.") for name in load_weights(tmp_path / "out.pth").tensors)
    assert convert([str(tmp_path / "in.pth"), str(tmp_path / "k.pth"), "--to", "kazuto1011"]) == 2
    assert "stride on the 3x3" in capsys.readouterr().err


def test_what_is_not_whole_or_there_already_is_refused(
    convert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TorchvisionResNet(*TINY).state_dict()
    torch.save({k: v for k, v in state.items() if k != "layer3.1.bn2.bias"}, tmp_path / "in.pth")
    assert convert([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 2
    assert "lacks backbone.layer3.1.bn2; what is written out must be whole" in capsys.readouterr().err
    torch.save(state, tmp_path / "in.pth")
    (tmp_path / "out.pth").write_text("mine")
    assert convert([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")]) == 2
    assert (tmp_path / "out.pth").read_text() == "mine"
    assert convert([str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--overwrite"]) == 0
    wide = TorchvisionResNet((1, 1, 2, 1), 8).state_dict()
    torch.save(wide, tmp_path / "wide.pth")
    assert convert([str(tmp_path / "wide.pth"), str(tmp_path / "o.pth")]) == 2
    assert "of another depth or width than ours" in capsys.readouterr().err


def test_published_weights_become_a_checkpoint_that_is_scored(convert: Any, tmp_path: Path) -> None:
    layers = CaffeNetBuilder(*TINY, 21, seed=0).layers
    (tmp_path / "train2_iter_20000.caffemodel").write_bytes(writers.caffemodel(layers))
    path = tmp_path / "c" / "published.pt"
    assert convert([str(tmp_path / "train2_iter_20000.caffemodel"), str(path), "--to", "checkpoint"]) == 0
    saved = read_checkpoint(path)
    image = torch.randn(1, 3, 65, 65)
    logits, expected = load_network(saved)(image), run_caffe(layers, image)["logits"]
    assert float((logits - expected).detach().abs().max()) < 1e-4 * float(expected.abs().max())
    assert saved.class_names == voc.CLASS_NAMES
    assert "trained on VOC 2012 val too" in saved.variant.note


def test_a_checkpoint_that_lost_its_sidecar_keeps_what_it_says_of_itself(convert: Any, tmp_path: Path) -> None:
    content = checkpoint_of(discerning_network(3)) | {"class_names": ["sky", "sea", "sand"], "best_miou": 0.5}
    content["config"]["data"]["num_classes"] = 3
    content |= {"train_keys_sha256": "of these", "train_key_hashes": torch.arange(5)}
    source = write_checkpoint(tmp_path / "in.pt", content)
    source.with_suffix(".json").unlink()
    assert convert([str(source), str(tmp_path / "out.pt"), "--to", "checkpoint"]) == 0
    saved, expected = read_checkpoint(tmp_path / "out.pt"), Checkpoint.from_content(content)
    for name in ("step", "config", "class_names", "train_keys_sha256", "best_miou"):
        assert getattr(saved, name) == getattr(expected, name), name
    assert saved.train_key_hashes is not None
    assert torch.equal(saved.train_key_hashes, torch.arange(5))


@pytest.mark.parametrize(
    ("target", "names", "sentence"),
    [("a.pt", None, "know 3 classes, but 21 names"), ("a.pth", "x\ny\nz\n", "must end in .pt, not a.pth")],
)
def test_a_checkpoint_needs_names_and_an_ending(
    convert: Any, caffemodel: Path, target: str, names: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(caffemodel), str(caffemodel.with_name(target)), "--to", "checkpoint"]
    if names:
        caffemodel.with_name("names.txt").write_text(names)
        arguments += ["--class-names", str(caffemodel.with_name("names.txt"))]
    assert convert(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not caffemodel.with_name(target).exists()
