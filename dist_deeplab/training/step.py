"""One optimizer update: where accumulation, precision and gradient synchronisation meet, and nowhere else."""

import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.profiler import record_function

from dist_deeplab.data.batch import Batch, blank_batch
from dist_deeplab.distributed.parallel import gradient_sync, unwrap
from dist_deeplab.distributed.process_group import all_reduce_sum, get_world_size
from dist_deeplab.model.deeplabv2 import MultiScale
from dist_deeplab.model.preprocessing import Preprocessing
from dist_deeplab.training.device_copy import DeviceCopier
from dist_deeplab.training.loss import CrossEntropy, cross_entropy_sum, sample_label
from dist_deeplab.training.precision import Precision


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
    wait_s: how long this rank waited for the last one to arrive at the step.
    """

    losses: dict[str, torch.Tensor]
    micro_losses: list[torch.Tensor]
    grad_norm: torch.Tensor
    loss_scale: torch.Tensor
    skipped: torch.Tensor
    stop: bool
    num_bad: int = 0
    wait_s: float = 0.0


@dataclass
class TrainStep:
    """Runs optimizer updates on a prepared model; holds no state of its own."""

    model: nn.Module
    optimizer: Optimizer
    precision: Precision
    preprocessing: Preprocessing
    loss: CrossEntropy
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        self.copy_to_device = DeviceCopier(self.precision.device)

    def __call__(self, micro_batches: list[Batch], *, stop: bool = False) -> StepResult:
        """Make one update from this rank's micro-batches (CPU tensors); every rank must call it.

        Each rank has the same number of them, at least one; they may be of any sizes, also of no images.

        `stop` says that this rank was asked to stop. There is no host-device synchronisation.
        """
        # 1. Count valid pixels (or their weight) of all ranks before the first backward, on the CPU where the labels
        #    still are: one small gloo all-reduce, which also carries stop requests and the number of bad samples.
        #    float64 holds numbers of pixels exactly.
        sizes = self._output_sizes(micro_batches[0])
        labels = [{name: sample_label(b.label, size) for name, size in sizes.items()} for b in micro_batches]
        pixel_weights = [self._pixel_weights(label) for label in labels]
        counts = [
            self.loss.divisor([label[name] for label in labels], [w[name] for w in pixel_weights if w])
            for name in sizes
        ]
        num_bad = sum(len(batch.bad) for batch in micro_batches)
        arrived = time.perf_counter()
        totals = all_reduce_sum(torch.tensor([*counts, int(stop), num_bad], dtype=torch.float64)).tolist()
        *counts, stops, num_bad = totals
        wait_s = time.perf_counter() - arrived
        # 2. DDP averages gradients over the ranks, so each rank's sum is multiplied by their number. All-void: 0.
        world_size = get_world_size()
        scales = {name: world_size / (count or 1.0) for name, count in zip(sizes, counts, strict=True)}
        # 3. Forward and backward; gradients are reduced on the last micro-batch only.
        self.optimizer.zero_grad()  # sets None; apex's FusedSGD takes no argument
        buffers = copy_buffers(self.model)
        sums: dict[str, torch.Tensor] = {}
        micro_losses = []
        last = len(micro_batches) - 1
        for i, (batch, label, weight) in enumerate(zip(micro_batches, labels, pixel_weights, strict=True)):
            with gradient_sync(self.model, enabled=i == last):
                losses = self._forward(batch, label, weight, scales)
                total = torch.stack(list(losses.values())).sum()
                self.precision.backward(total, last=i == last)
            micro_losses.append(total.detach())
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach()
        # 4. Update; a skipped one leaves no trace, in the running statistics neither.
        scale = self.precision.loss_scale()
        skipped, grad_norm = self.precision.step(self.optimizer, self.clip_norm)
        restore_buffers(self.model, buffers, where=skipped)
        shares = {name: loss / world_size for name, loss in sums.items()}
        return StepResult(shares, micro_losses, grad_norm, scale, skipped, stops > 0, int(num_bad), wait_s)

    def warm_up(self, *, micro_size: int, crop_size: int) -> None:
        """Run one forward and backward on blank images and restore all that they changed; every rank must call it.

        DDP reduces the gradients of a process's first backward in other buckets than the later ones, so in another
        order of summation. Without this the first step after a restart would differ in its last bits.
        """
        blank = blank_batch(micro_size, crop_size)
        sizes = self._output_sizes(blank)
        label = {name: sample_label(blank.label, size) for name, size in sizes.items()}
        buffers = copy_buffers(self.model)
        losses = self._forward(blank, label, self._pixel_weights(label), dict.fromkeys(sizes, 0.0))
        self.precision.backward(torch.stack(list(losses.values())).sum())
        self.optimizer.zero_grad()  # sets None; apex's FusedSGD takes no argument
        restore_buffers(self.model, buffers, where=torch.tensor(True, device=self.precision.device))

    def _output_sizes(self, batch: Batch) -> dict[str, tuple[int, int]]:
        net = unwrap(self.model)
        assert isinstance(net, MultiScale)
        return net.output_sizes((batch.label.shape[1], batch.label.shape[2]))

    def _pixel_weights(self, label: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each output's pixel weights; empty where all pixels count alike."""
        return {name: self.loss.weigh(target) for name, target in label.items()} if self.loss.is_weighted else {}

    @record_function("forward")
    def _forward(
        self,
        batch: Batch,
        label: dict[str, torch.Tensor],
        weight: dict[str, torch.Tensor],
        scales: dict[str, float],
    ) -> dict[str, torch.Tensor]:
        """Each output's loss times its scale, float32 [] on the device."""
        image, content, *rest = self.copy_to_device(batch.image, batch.content, *label.values(), *weight.values())
        targets = dict(zip(label, rest[: len(label)], strict=True))
        weights = dict(zip(weight, rest[len(label) :], strict=True))
        with self.precision.autocast():
            outputs = self.model(self.preprocessing.normalize(image, content))
        return {
            name: cross_entropy_sum(logits, targets[name], self.loss.ignore_label, weights.get(name)) * scales[name]
            for name, logits in outputs.items()
        }


@torch.no_grad()
def copy_buffers(module: nn.Module) -> dict[torch.dtype, torch.Tensor]:
    """All buffers of a module, in one flat tensor per dtype."""
    return {dtype: torch.cat([b.flatten() for b in buffers]) for dtype, buffers in _by_dtype(module).items()}


@torch.no_grad()
def restore_buffers(module: nn.Module, copies: dict[torch.dtype, torch.Tensor], *, where: torch.Tensor) -> None:
    """Give a module's buffers the copied values if `where` (bool [] on their device) is true, unseen by the host.

    Otherwise a NaN of a skipped update would stay in the running statistics.
    """
    for dtype, buffers in _by_dtype(module).items():
        now = torch.cat([b.flatten() for b in buffers])
        chosen = torch.where(where, copies[dtype], now).split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(chosen, buffers, strict=True)])


def _by_dtype(module: nn.Module) -> dict[torch.dtype, list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in module.buffers():
        groups.setdefault(buffer.dtype, []).append(buffer)
    return groups
