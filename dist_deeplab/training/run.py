"""`Run`: what a training is made of once everything about it is decided; `TrainState` is what changes in it."""

from dataclasses import dataclass, field

from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.config import RunConfig
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.model.weights import Variant
from dist_deeplab.tracking.tracker import Tracker


@dataclass(frozen=True)
class Run:
    """One rank's view of a run; the functions that tell its story take `(run, state)`.

    config: what was asked for. env: this rank among the ranks. split: how a step's images are shared out, with
    `batch.micro_size: auto` found out. variant: what the network is. train_set, val_set: the samples; without a
    validation set nothing is scored. session: stop requests, progress, the launcher. checkpoints: the run's folder of
    them. tracker: where metrics go; nowhere until the run has begun.
    """

    config: RunConfig
    env: DistEnv
    split: BatchSplit
    variant: Variant
    train_set: Manifest
    val_set: Manifest | None
    session: TrainingSession
    checkpoints: CheckpointFolder
    tracker: Tracker = field(default_factory=Tracker)
