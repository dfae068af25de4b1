"""`model.train_only=head`: the last layers learn, and nothing else of the network moves or takes part."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_deeplab.config import load_config
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.model.deeplabv2 import MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights import SCRATCH, Weights
from dist_deeplab.training.builders import build_network, starting_weights
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep

SPLIT = BatchSplit(4, 2, 1)
ARGUMENTS = ["model.backbone=resnet_tiny", "data.num_classes=5", "model.train_only=head", "optim.lr=1e-3"]


@pytest.mark.parametrize("batch_norm", ["sync", "local", "frozen"])
def test_only_the_last_layers_learn_and_the_backbone_is_frozen_with_its_statistics(
    trained_state: dict[str, torch.Tensor], make_batch: Any, batch_norm: str
) -> None:
    config = load_config(None, [*ARGUMENTS, f"model.batch_norm={batch_norm}"])
    net = build_network(config, SPLIT, SCRATCH, Weights("x.pt", SCRATCH, trained_state)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = build_optimizer(net, config.optim)
    assert [group["name"] for group in optimizer.param_groups] == ["head_weight", "head_bias"]
    step = TrainStep(MultiScale(net), optimizer, Precision("fp32", torch.device("cpu")), CAFFE, CrossEntropy(255))
    step([make_batch([0.1, 0.2]), make_batch([0.3, 0.0], seed=2)])
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("head.")}
    assert all(parameter.grad is None for parameter in net.backbone.parameters())


def test_frozen_batch_norm_learns_nothing_while_the_rest_does(
    trained_state: dict[str, torch.Tensor], make_batch: Any
) -> None:
    config = load_config(None, [*ARGUMENTS, "model.train_only=all", "model.batch_norm=frozen"])
    net = build_network(config, SPLIT, SCRATCH, Weights("x.pt", SCRATCH, trained_state)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = build_optimizer(net, config.optim)
    assert [group["name"] for group in optimizer.param_groups] == ["backbone", "head_weight", "head_bias"]
    step = TrainStep(MultiScale(net), optimizer, Precision("fp32", torch.device("cpu")), CAFFE, CrossEntropy(255))
    step([make_batch([0.1, 0.2]), make_batch([0.3, 0.0], seed=2)])
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".bn" not in name and ".downsample.1" not in name}


def test_the_whole_network_learns_by_default(trained_state: dict[str, torch.Tensor]) -> None:
    config = load_config(None, [*ARGUMENTS, "model.train_only=all"])
    net = build_network(config, SPLIT, SCRATCH, Weights("x.pt", SCRATCH, trained_state))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_last_layers_alone_need_a_backbone_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.train_only=head .* model\.init="):
        starting_weights(load_config(None, ARGUMENTS), DistEnv())
    assert starting_weights(load_config(None), DistEnv()) is None
