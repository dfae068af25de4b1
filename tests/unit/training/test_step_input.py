"""What an update is made from: sums over the ranks that start before they are needed, and no operation depends on."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dist_deeplab.data.batch import BadSample, Batch
from dist_deeplab.distributed.rank_sums import PendingSums, RankSums
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.step import TrainStep
from dist_deeplab.training.step_input import MicroBatch, StepInputs

MakeBatch = Callable[..., Batch]
SIZES = {"fused": (5, 5), "scale_0.5": (3, 3)}


class Recorded(RankSums):
    """Alone among the ranks, it writes down what is asked for, and what the others say."""

    def __init__(self, others: Sequence[float] = ()) -> None:
        super().__init__(torch.device("cpu"))
        self.others = others
        self.asked: list[list[float]] = []

    def start(self, values: Sequence[float]) -> PendingSums:
        self.asked.append(list(values))
        others = self.others or [0.0] * len(values)
        return super().start([own + other for own, other in zip(values, others, strict=True)])


@pytest.fixture
def sums() -> Recorded:
    return Recorded()


@pytest.fixture
def inputs(sums: Recorded) -> StepInputs:
    return StepInputs(CrossEntropy(255), lambda size: SIZES, sums)


def test_it_counts_the_valid_pixels_of_each_output_the_stop_request_and_the_bad_samples(
    inputs: StepInputs, sums: Recorded, make_batch: MakeBatch
) -> None:
    first, second = make_batch([0.0, 1.0]), make_batch([0.0])
    second.bad.append(BadSample("a", "damaged"))
    sums.others = [100.0, 10.0, 0.0, 2.0]
    step_input = inputs.prepare([first, second], stop=True)
    assert sums.asked == [[2 * 25, 2 * 9, 1, 1]]
    assert step_input.loss_scales().tolist() == pytest.approx([1 / 150, 1 / 28])
    assert step_input.num_bad() == 3
    assert step_input.batches == [first, second]


def test_where_all_pixels_are_void_the_factor_is_finite(inputs: StepInputs, make_batch: MakeBatch) -> None:
    assert inputs.prepare([make_batch([1.0])]).loss_scales().tolist() == [1.0, 1.0]


def test_the_sums_of_a_step_are_asked_for_before_the_step_before_it(
    inputs: StepInputs, sums: Recorded, make_batch: MakeBatch
) -> None:
    seen = []
    loader = ((step, [make_batch([0.0], seed=step)]) for step in range(4))
    for step, step_input in enumerate(inputs.ahead(loader, lambda: False)):
        assert torch.equal(step_input.batches[0].image, make_batch([0.0], seed=step).image)
        seen.append(len(sums.asked))
    assert seen == [2, 3, 4, 4], "one ahead, and none after the last step"


def test_a_run_of_no_steps_asks_for_nothing(inputs: StepInputs, sums: Recorded) -> None:
    assert list(inputs.ahead(iter(()), lambda: False)) == []
    assert sums.asked == []


def test_a_stop_request_made_during_a_step_is_known_after_the_next_one(
    inputs: StepInputs, make_batch: MakeBatch
) -> None:
    requests: list[int] = []
    known = []
    loader = ((step, [make_batch([0.0])]) for step in range(5))
    for step, step_input in enumerate(inputs.ahead(loader, lambda: bool(requests))):
        if step == 1:
            requests.append(step)
        known.append(step_input.stop())
    # While step 1 runs it is asked for; the sums of step 3, which start before step 2, carry it.
    assert known == [False, False, True, True, True]


def test_another_ranks_stop_request_is_known_after_the_same_step(make_batch: MakeBatch) -> None:
    others = Recorded()
    known: list[bool] = []

    def loader() -> Iterator[tuple[int, list[Batch]]]:
        for step in range(4):
            others.others = [0, 0, float(step == 2), 0]
            yield step, [make_batch([0.0])]

    for step_input in StepInputs(CrossEntropy(255), lambda size: SIZES, others).ahead(loader(), lambda: False):
        known.append(step_input.stop())
    assert known[:2] == [False, True]


def _graph(step: TrainStep, batch: Batch) -> str:
    """The operations of a micro-batch's forward and backward pass, with the numbers that are written into them."""
    step_input = step.inputs.prepare([batch])
    [micro_batch] = step_input.micro_batches
    parameters = [p for p in step.model.parameters() if p.requires_grad]

    def forward_and_backward(
        image: torch.Tensor, content: torch.Tensor, labels: dict[str, torch.Tensor], scales: torch.Tensor
    ) -> list[torch.Tensor]:
        losses = step._forward(MicroBatch(Batch(image, batch.label, content, batch.keys), labels, {}), scales)
        step.precision.backward(torch.stack(list(losses.values())).sum())
        gradients = [p.grad for p in parameters]
        step.optimizer.zero_grad()
        return [*losses.values(), *gradients]

    traced = make_fx(forward_and_backward)(batch.image, batch.content, micro_batch.labels, step_input.loss_scales())
    return str(traced.code)


@pytest.mark.quick("P10")
@pytest.mark.parametrize("scales", [(), (1.0, 0.5)])
def test_no_operation_of_a_micro_batch_depends_on_the_number_of_valid_pixels(
    make_net: Callable[..., DeepLabV2],
    make_step: Callable[..., TrainStep],
    make_batch: MakeBatch,
    scales: tuple[float, ...],
) -> None:
    step = make_step(make_net(), scales=scales)
    step.warm_up(micro_size=2, crop_size=33)  # computes once what frozen layers multiply by
    few, many, none = (_graph(step, make_batch([share, share])) for share in (0.9, 0.1, 1.0))
    assert few.count("convolution_backward") > 5
    assert few == many == none
