"""Network, optimizer and state of a run, put together as it begins or goes on."""

from typing import Any, NamedTuple

from torch import nn

from dist_deeplab.config import RunConfig
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.weights import SCRATCH, Variant
from dist_deeplab.training.builders import (
    build_loss_window,
    build_model,
    build_network,
    build_precision,
    starting_weights,
)
from dist_deeplab.training.memory import settle_micro_size
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.resume import restore
from dist_deeplab.training.state import TrainState


class Assembled(NamedTuple):
    """What a run trains.

    split: with `batch.micro_size: auto` found out. variant: what the network is. model: the network as it is trained,
    with the other ranks. state: network, optimizer, and where the run stands.
    """

    split: BatchSplit
    variant: Variant
    model: nn.Module
    state: TrainState


def assemble(
    config: RunConfig, env: DistEnv, split: BatchSplit, saved: dict[str, Any] | None, val_set: Manifest | None
) -> Assembled:
    """Return what a run trains, from a checkpoint's content, else from `model.init`; every rank calls it.

    Raises:
        UserError: weights or settings that do not fit each other, or this machine.
    """
    weights = starting_weights(config, saved)
    variant = Variant.from_plain(saved["variant"]) if saved else weights.variant if weights else SCRATCH
    split = settle_micro_size(config, env, split, variant, saved)
    net = build_network(config, split, variant, weights)
    model = build_model(config, env, net)
    optimizer = build_optimizer(net, config.optim)
    precision = build_precision(config, env, net, optimizer)
    state = TrainState(net, optimizer, precision, build_loss_window(config, env), split.micro_size)
    if saved:
        restore(state, saved, config, val_set)
    return Assembled(split, variant, model, state)
