"""`TrainState`: all that a run needs to continue, and nothing else.

Held: weights and batch-norm statistics, momentum, gradient scaler, losses since the last log line, step, number of
skipped updates, best score, whether an evaluation was cut short. Not held, because it follows from the configuration
and the step: learning rate, sample order, augmentation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from dist_deeplab.data.batch import Batch
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.training.loss_window import LossWindow
from dist_deeplab.training.optim import load_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import StepResult


@dataclass
class TrainState:
    """The mutable state of a run.

    step: optimizer steps done, skipped ones too.
    micro_size: the most images of a micro-batch, which a run that found it out keeps.
    num_skipped: those of them whose update was skipped, int64 [] on the device, or 0.
    best_before: the best score before `best_miou`, for a run that could not write the checkpoint with that.
    scored_keys_sha256: which images `best_miou` is a score of.
    """

    net: DeepLabV2
    optimizer: Optimizer
    precision: Precision
    losses: LossWindow
    micro_size: int = 0
    step: int = 0
    num_skipped: torch.Tensor | int = 0
    best_miou: float = -1.0
    best_before: float = -1.0
    scored_keys_sha256: str = ""
    pending_evaluation: bool = False  # asked to stop during one: the next start makes up for it

    @property
    def schedule_step(self) -> torch.Tensor | int:
        """Where the learning rate's schedule stands: updates made. The host does not wait to know it."""
        return self.step - self.num_skipped

    def advance(self, result: StepResult, micro_batches: Sequence[Batch]) -> None:
        """Count a step that was done from these micro-batches."""
        self.losses.add(self.step, result, micro_batches)
        self.step += 1
        self.num_skipped = self.num_skipped + result.skipped.long()

    def update_best(self, miou: float, keys_sha256: str) -> bool:
        """Remember the best mIoU, and of which images; return whether this is it."""
        self.scored_keys_sha256 = keys_sha256
        if miou <= self.best_miou:
            return False
        self.best_before, self.best_miou = self.best_miou, miou
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.state_dict(),
            "losses": self.losses.state_dict(),
            "micro_size": self.micro_size,
            "step": self.step,
            "num_skipped": int(self.num_skipped),
            "best_miou": self.best_miou,
            "val_keys_sha256": self.scored_keys_sha256,
            "owes_evaluation": self.pending_evaluation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            RuntimeError: a tensor is missing or has another shape.
        """
        self.net.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.precision.load_state_dict(state["scaler"])
        self.losses.load_state_dict(state["losses"])
        self.step = state["step"]
        self.num_skipped = state["num_skipped"]
        self.best_miou = state["best_miou"]
        self.scored_keys_sha256 = state.get("val_keys_sha256", "")
        self.pending_evaluation = state.get("owes_evaluation", False)
