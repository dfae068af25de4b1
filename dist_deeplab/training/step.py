"""One optimizer update: where accumulation, precision and gradient synchronisation meet, and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import record_function

from dist_deeplab.data.batch import Batch, blank_batch
from dist_deeplab.distributed.parallel import gradient_sync, unwrap
from dist_deeplab.distributed.process_group import get_world_size
from dist_deeplab.distributed.rank_sums import RankSums
from dist_deeplab.model.deeplabv2 import MultiScale
from dist_deeplab.model.preprocessing import Preprocessing
from dist_deeplab.training.buffers import copy_buffers, restore_buffers
from dist_deeplab.training.cuda_graph import is_graphed, zero_gradients
from dist_deeplab.training.device_copy import DeviceCopier
from dist_deeplab.training.loss import CrossEntropy, cross_entropy_sum
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step_input import MicroBatch, StepInput, StepInputs


@dataclass
class StepResult:
    """What one update did; tensors are float32 [] on the device, so that nobody has to wait for them.

    losses: {output name: this rank's share of the cross-entropy}; their sum over the ranks is the mean over the step's
    valid pixels (or images: `CrossEntropy.average`).
    micro_losses: this rank's, for each micro-batch the sum over the outputs.
    The others are equal on all ranks.
    grad_norm: L2 norm of the whole gradient before clipping.
    loss_scale: what fp16 multiplied the loss by; 1 else.
    skipped: bool; whether no update was made, because the gradient was not finite.
    stop: whether a rank was asked to stop.
    num_bad: samples of the step, over all ranks, in whose place others had to be taken.
    wait_s: how long after this rank the last one had the step's batches.
    """

    losses: dict[str, torch.Tensor]
    micro_losses: list[torch.Tensor]
    grad_norm: torch.Tensor
    loss_scale: torch.Tensor
    skipped: torch.Tensor
    stop: bool
    num_bad: int = 0
    wait_s: float = 0.0


class TrainStep:
    """Runs optimizer updates on a prepared model; every rank makes the same calls.

    inputs: makes what an update takes from a loader's batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        preprocessing: Preprocessing,
        loss: CrossEntropy,
        clip_norm: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.preprocessing = preprocessing
        self.ignore_label = loss.ignore_label
        self.clip_norm = clip_norm
        self.copy_to_device = DeviceCopier(precision.device)
        network = unwrap(model)
        assert isinstance(network, MultiScale)
        self.is_graphed = is_graphed(network)
        self.inputs = StepInputs(loss, network.output_sizes, RankSums(precision.device))

    def __call__(self, micro_batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """Make one update from this rank's micro-batches (CPU tensors), which are prepared just now.

        Each rank has the same number of them, at least one; they may be of any sizes, also of no images. `stop` says
        that this rank was asked to stop.
        """
        return self.update(self.inputs.prepare(micro_batches, stop=stop))

    def update(self, step_input: StepInput) -> StepResult:
        """Make one update. The host waits for the ranks' sums alone, which were asked for before."""
        # 1. The factors of the losses, which stay on the device.
        scales = step_input.loss_scales()
        # 2. Forward and backward; gradients are reduced on the last micro-batch only.
        self._zero_gradients()
        buffers = copy_buffers(self.model)
        sums: dict[str, torch.Tensor] = {}
        micro_losses = []
        last = len(step_input.micro_batches) - 1
        for i, micro_batch in enumerate(step_input.micro_batches):
            with gradient_sync(self.model, enabled=i == last):
                losses = self._forward(micro_batch, scales)
                total = torch.stack(list(losses.values())).sum()
                self.precision.backward(total, last=i == last)
            micro_losses.append(total.detach())
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()
        # 3. Update; a skipped one leaves no trace, in the running statistics neither.
        scale = self.precision.loss_scale()
        skipped, grad_norm = self.precision.step(self.optimizer, self.clip_norm)
        restore_buffers(self.model, buffers, where=skipped)
        shares = {name: loss / get_world_size() for name, loss in sums.items()}
        # 4. What the ranks agreed on meanwhile.
        agreed = step_input.stop(), step_input.num_bad(), step_input.sums.wait_s()
        return StepResult(shares, micro_losses, grad_norm, scale, skipped, *agreed)

    def warm_up(self, *, micro_size: int, crop_size: int) -> None:
        """Run one forward and backward on blank images and restore all that they changed; every rank must call it.

        DDP reduces the gradients of a process's first backward in other buckets than the later ones, so in another
        order of summation. Without this the first step after a restart would differ in its last bits.
        """
        blank = self.inputs.micro_batch(blank_batch(micro_size, crop_size))
        buffers = copy_buffers(self.model)
        losses = self._forward(blank, torch.zeros(len(blank.labels), device=self.precision.device))
        self.precision.backward(torch.stack(list(losses.values())).sum())
        self._zero_gradients()
        restore_buffers(self.model, buffers, where=torch.tensor(True, device=self.precision.device))

    def _zero_gradients(self) -> None:
        if self.is_graphed:
            zero_gradients(self.model)
        else:
            self.optimizer.zero_grad()  # sets None; apex's FusedSGD takes no argument

    @record_function("forward")
    def _forward(self, micro_batch: MicroBatch, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each output's loss times its scale, float32 [] on the device."""
        batch, labels, weights = micro_batch.batch, micro_batch.labels, micro_batch.weights
        image, content, *rest = self.copy_to_device(batch.image, batch.content, *labels.values(), *weights.values())
        on_device = dict(zip(labels, rest[: len(labels)], strict=True))
        pixel_weights = dict(zip(weights, rest[len(labels) :], strict=True))
        scale = dict(zip(labels, scales.unbind(), strict=True))
        with self.precision.autocast():
            outputs = self.model(self.preprocessing.normalize(image, content))
        return {
            name: cross_entropy_sum(logits, on_device[name], self.ignore_label, pixel_weights.get(name)) * scale[name]
            for name, logits in outputs.items()
        }
