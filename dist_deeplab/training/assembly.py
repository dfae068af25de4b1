"""A run put together as it begins or continues: checkpoint, network, optimizer, state."""

from typing import NamedTuple

from torch import nn

from dist_deeplab.config import RunConfig
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import (
    build_checkpoints,
    build_loss_window,
    build_model,
    build_network,
    build_precision,
    network_variant,
    starting_weights,
)
from dist_deeplab.training.cuda_graph import require_cuda_graph
from dist_deeplab.training.memory import find_micro_batch_size
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import choose_precision
from dist_deeplab.training.resume import find_checkpoint, restore
from dist_deeplab.training.run import Run
from dist_deeplab.training.state import TrainState


class Assembled(NamedTuple):
    """A run, the network as it is trained (with the other ranks), and the state that training changes."""

    run: Run
    model: nn.Module
    state: TrainState


def assemble(
    config: RunConfig, env: DistEnv, split: BatchSplit, data: tuple[Manifest, Manifest | None], session: TrainingSession
) -> Assembled:
    """The run at the step of its newest checkpoint, else at step 0 with the weights of `model.init`.

    Every rank calls it. The checkpoint's tensors (0.35 GB for ResNet-101) are released when it returns.

    Raises:
        UserError: weights or settings that do not fit each other, or this machine.
    """
    train_set, val_set = data
    checkpoints = build_checkpoints(config, env)
    saved = find_checkpoint(config, env, checkpoints, train_set)
    config = choose_precision(config, env, before=saved.config.precision.dtype if saved else None)
    weights = None if saved else starting_weights(config, env)
    variant = network_variant(config, saved.variant if saved else weights.variant if weights else SCRATCH)
    split = find_micro_batch_size(config, env, split, variant, saved.micro_size if saved else 0)
    if config.speed.cuda_graph:
        require_cuda_graph(config, env, split)
    run = Run(config, env, split, variant, train_set, val_set, session, checkpoints)
    net = build_network(config, split, variant, weights)
    model = build_model(config, env, net)
    optimizer = build_optimizer(net, config.optim)
    precision = build_precision(config, env, net, optimizer)
    state = TrainState(net, optimizer, precision, build_loss_window(config, env), split.micro_size)
    if saved:
        restore(state, saved, config, val_set)
    return Assembled(run, model, state)
