"""What an update is made from: micro-batches, what the loss needs of their labels, and what all ranks have together.

The numbers that the ranks agree on (valid pixels, stop requests, bad samples) are summed one step ahead: those of step
s + 1 while step s computes. So nothing waits for them, and no kernel of a step depends on a number of the host.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.process_group import get_world_size
from dist_deeplab.distributed.rank_sums import PendingSums, RankSums
from dist_deeplab.training.loss import CrossEntropy, sample_label


@dataclass(frozen=True)
class MicroBatch:
    """A batch and, per output of the network, its label on that output's grid. All tensors are on the CPU.

    labels: int64 [B, h, w]; weights: float32 [B, h, w], each pixel's, empty where all count alike.
    """

    batch: Batch
    labels: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


@dataclass
class StepInput:
    """This rank's micro-batches of a step, and the sums of that step over all ranks.

    following: the next step's input, where it is prepared already.
    """

    micro_batches: list[MicroBatch]
    sums: PendingSums
    following: "StepInput | None" = None

    @property
    def batches(self) -> list[Batch]:
        """The micro-batches as they came from the loader."""
        return [micro_batch.batch for micro_batch in self.micro_batches]

    def loss_scales(self) -> torch.Tensor:
        """What each output's sum of the cross-entropy is multiplied by, float32 [outputs] on the device.

        Number of ranks over number (weight) of valid pixels of all ranks: DDP averages gradients over the ranks. Where
        all pixels are void the sum is 0, whatever the factor.
        """
        counts = self.sums.on_device()[:-2]
        return (get_world_size() / counts.masked_fill(counts == 0, 1.0)).float()

    def num_bad(self) -> int:
        """Samples of this step, over all ranks, in whose place others had to be taken."""
        return int(self.sums.read()[-1])

    def stop(self) -> bool:
        """Whether a rank was asked to stop, the same answer on all of them: it was, before this step began."""
        return (self.following or self).sums.read()[-2] > 0


@dataclass
class StepInputs:
    """Makes inputs from batches, the same number of times on all ranks.

    loss: how pixels count. output_sizes: from (H, W) of an image, {output name: (h, w) of its grid}.
    """

    loss: CrossEntropy
    output_sizes: Callable[[tuple[int, int]], dict[str, tuple[int, int]]]
    rank_sums: RankSums

    def prepare(self, batches: Sequence[Batch], *, stop: bool = False) -> StepInput:
        """The input of a step; its sums have been asked for. `stop`: whether this rank was asked to stop."""
        micro_batches = [self.micro_batch(batch) for batch in batches]
        weights = [one.weights for one in micro_batches if one.weights]
        counts = [
            self.loss.divisor([one.labels[name] for one in micro_batches], [each[name] for each in weights])
            for name in micro_batches[0].labels
        ]
        num_bad = sum(len(batch.bad) for batch in batches)
        return StepInput(micro_batches, self.rank_sums.start([*counts, int(stop), num_bad]))

    def ahead(self, batches: Iterable[tuple[int, Sequence[Batch]]], stop: Callable[[], bool]) -> Iterator[StepInput]:
        """The inputs of a loader's steps; when one is given out, the sums of the following one are on their way.

        stop: whether this rank was asked to stop; asked before each step.
        """
        current: StepInput | None = None
        for _, micro_batches in batches:
            following = self.prepare(micro_batches, stop=stop())
            if current is not None:
                current.following = following
                yield current
            current = following
        if current is not None:
            yield current

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """A batch with its label on the outputs' grids."""
        height, width = batch.label.shape[1:]
        labels = {name: sample_label(batch.label, size) for name, size in self.output_sizes((height, width)).items()}
        weights = {name: self.loss.weigh(label) for name, label in labels.items()} if self.loss.is_weighted else {}
        return MicroBatch(batch, labels, weights)
