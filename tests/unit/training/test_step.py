"""One update is the same however its images are cut into micro-batches, and equals a slow implementation."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.batch import blank_batch
from dist_deeplab.data.loader import Batch, collate
from dist_deeplab.model.batch_norm import FrozenBatchNorm
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import poly_lr, set_lr
from dist_deeplab.training.step import TrainStep

MakeNet = Callable[..., DeepLabV2]
MakeBatch = Callable[..., Batch]
MakeStep = Callable[..., TrainStep]

IGNORE = 255
SCALES = [(), (1.0, 0.75, 0.5)]
UNEQUAL_VOID = [0.0, 0.9, 0.3, 1.0, 0.95, 0.95, 0.0, 0.1]


def cut(batch: Batch, size: int) -> list[Batch]:
    """The batch as micro-batches of `size` images."""
    parts = zip(batch.image.split(size), batch.label.split(size), batch.content.split(size))
    keys = [batch.keys[i : i + size] for i in range(0, len(batch.keys), size)]
    return [Batch(*part, names) for part, names in zip(parts, keys)]


def gradient(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def slow_sample(label: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The label at the pixels of a corner-aligned grid, rounded half up."""
    rows = [int(i * (label.shape[1] - 1) / (size[0] - 1) + 0.5) for i in range(size[0])]
    columns = [int(j * (label.shape[2] - 1) / (size[1] - 1) + 0.5) for j in range(size[1])]
    return torch.tensor([[[int(one[i, j]) for j in columns] for i in rows] for one in label])


def slow_mean_cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean of -log prob over the valid pixels; 0 where there are none."""
    label = slow_sample(label, tuple(logits.shape[2:]))
    log_prob = logits - logits.exp().sum(1, keepdim=True).log()
    terms = [-log_prob[b, label[b, i, j], i, j] for b, i, j in np.ndindex(*label.shape) if label[b, i, j] != IGNORE]
    return torch.stack(terms).mean() if terms else 0 * logits.sum()


def slow_losses(net: DeepLabV2, batch: Batch, scales: tuple[float, ...]) -> dict[str, torch.Tensor]:
    outputs = MultiScale(net, scales)(CAFFE.normalize(batch.image, batch.content))
    return {name: slow_mean_cross_entropy(logits, batch.label) for name, logits in outputs.items()}


# --- any split, one gradient ------------------------------------------------------------------------------------------


@pytest.mark.quick("P2")
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("void_shares", [[0.0] * 8, UNEQUAL_VOID], ids=["no void", "unequal void"])
def test_accumulation_equals_one_large_batch(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, void_shares: list[float], scales: tuple[float, ...]
) -> None:
    batch = make_batch(void_shares)
    gradients, losses = {}, {}
    for size in (8, 4, 2, 1):
        net = make_net()
        losses[size] = make_step(net, scales=scales)(cut(batch, size)).losses
        gradients[size] = gradient(net)
    for size in (4, 2, 1):
        assert relative_error(gradients[size], gradients[8]) <= 1e-5
        for name, loss in losses[size].items():
            assert float(loss) == pytest.approx(float(losses[8][name]), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(IGNORE, (0.1, 2.0, 0.5, 7.0, 1.0)),
        CrossEntropy(IGNORE, average="images"),
        CrossEntropy(IGNORE, (0.1, 2.0, 0.5, 7.0, 1.0), "images"),
    ],
    ids=["class weights", "images", "both"],
)
def test_weights_of_pixels_do_not_depend_on_the_split(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, loss: CrossEntropy
) -> None:
    batch, scales = make_batch(UNEQUAL_VOID), (1.0, 0.75, 0.5)
    whole, plain = make_net(), make_net()
    expected = make_step(whole, scales=scales, loss=loss)([batch]).losses
    make_step(plain, scales=scales)([batch])
    assert relative_error(gradient(plain), gradient(whole)) > 0.02, "the weights change nothing"
    for size in (3, 1):
        net = make_net()
        losses = make_step(net, scales=scales, loss=loss)(cut(batch, size)).losses
        assert relative_error(gradient(net), gradient(whole)) <= 1e-5
        assert [float(value) for value in losses.values()] == pytest.approx(list(map(float, expected.values())), 1e-5)


@pytest.mark.quick("P2")
def test_a_mean_of_means_would_be_another_gradient(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep
) -> None:
    """The test above can fail: with unequal void, micro-batches do not weigh alike."""
    batch, net, reference = make_batch(UNEQUAL_VOID), make_net(), make_net()
    make_step(net)([batch])
    parts = cut(batch, 2)
    torch.stack([slow_losses(reference, part, ())["scale_1"] for part in parts]).mean().backward()
    assert relative_error(gradient(reference), gradient(net)) > 0.05


@pytest.mark.parametrize("scales", SCALES)
def test_losses_and_gradient_equal_the_slow_reference(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, scales: tuple[float, ...]
) -> None:
    batch, net, reference = make_batch(UNEQUAL_VOID[:4]), make_net(), make_net()
    result = make_step(net, scales=scales)(cut(batch, 2))
    expected = slow_losses(reference, batch, scales)
    assert list(result.losses) == list(expected)
    assert len(expected) == (4 if scales else 1)
    sum(expected.values()).backward()  # equally weighted: four losses, each with weight 1
    for name, loss in result.losses.items():
        assert loss.dtype == torch.float32
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(expected[name].item(), rel=1e-5)
    assert relative_error(gradient(net), gradient(reference)) <= 1e-5


# --- void -------------------------------------------------------------------------------------------------------------


def test_an_all_void_micro_batch_changes_nothing(make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep) -> None:
    content, void = make_batch([0.2, 0.5]), make_batch([1.0, 1.0], seed=9)
    alone, among = make_net(), make_net()
    expected = make_step(alone)([content]).losses["scale_1"]
    loss = make_step(among)([void, content, void]).losses["scale_1"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert relative_error(gradient(among), gradient(alone)) <= 1e-6


@pytest.mark.parametrize("batch_norm", ["frozen", "local"])
@pytest.mark.parametrize("scales", SCALES)
def test_a_micro_batch_of_no_images_changes_nothing(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, scales: tuple[float, ...], batch_norm: str
) -> None:
    content = make_batch([0.2, 0.5])
    alone, among = make_net(batch_norm), make_net(batch_norm)
    expected = make_step(alone, scales=scales)([content]).losses
    losses = make_step(among, scales=scales)([content, blank_batch(0, content.image.shape[2])]).losses
    assert losses == expected
    for (name, value), other in zip(alone.state_dict().items(), among.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_all_void_step_has_loss_0_and_only_decays_the_weights(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, scales: tuple[float, ...], dtype: str
) -> None:
    net = make_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step = make_step(net, scales=scales, dtype=dtype, optim=OptimConfig(lr=0.01, weight_decay=0.5))
    result = step([make_batch([1.0, 1.0]), make_batch([1.0, 1.0], seed=2)])
    assert not result.skipped
    assert {float(loss) for loss in result.losses.values()} == {0.0}
    assert torch.count_nonzero(gradient(net)) == 0
    for name, parameter in net.named_parameters():
        rate = 0.1 if name.startswith("head.") else 0.01
        decayed = parameter.requires_grad and name.endswith("weight")
        expected = before[name] * (1 - rate * 0.5) if decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


# --- the whole update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", SCALES)
def test_three_steps_equal_a_slow_implementation(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, scales: tuple[float, ...]
) -> None:
    config = OptimConfig(lr=2e-3, weight_decay=0.1)
    net, reference = make_net(), make_net()
    step = make_step(net, scales=scales, optim=config)
    velocity: dict[str, torch.Tensor] = {}
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    for number in range(3):
        batch = make_batch([0.9, 0.1, 0.3, 0.0], seed=number)
        set_lr(step.optimizer, poly_lr(number, config, max_steps=10))
        step(cut(batch, 2))

        loss = sum(slow_losses(reference, batch, scales).values())
        trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
        for (name, p), grad in zip(trained.items(), torch.autograd.grad(loss, list(trained.values()))):
            head, bias = name.startswith("head."), name.endswith("bias")
            rate = 2e-3 * (1 - number / 10) ** 0.9 * (20 if head and bias else 10 if head else 1)
            velocity[name] = 0.9 * velocity.get(name, 0) + grad + (0 if bias else 0.1) * p.detach()
            p.data = p.data - rate * velocity[name]
    for name, expected in reference.named_parameters():
        ours = dict(net.named_parameters())[name]
        if expected.requires_grad:
            assert relative_error(ours.detach() - start[name], expected.detach() - start[name]) <= 5e-5, name
        else:
            assert torch.equal(ours, start[name]), name


def test_frozen_statistics_stay_frozen_and_trained_ones_move(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep
) -> None:
    for batch_norm in ("frozen", "sync", "local"):
        net = make_net(batch_norm)
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        make_step(net)([make_batch([0.1, 0.2])])
        moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
        assert moved == (set() if batch_norm == "frozen" else set(before))


def test_a_step_starts_from_no_gradient(make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep) -> None:
    net, other = make_net(), make_net()
    step, same = make_step(net), make_step(other)
    for each in (step, same):
        set_lr(each.optimizer, torch.tensor(0.0))
    step([make_batch([0.0], seed=3)])
    step([make_batch([0.0], seed=4)])
    same([make_batch([0.0], seed=4)])
    assert torch.equal(gradient(net), gradient(other))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_clip_norm_shortens_a_long_gradient_and_leaves_a_short_one(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, dtype: str
) -> None:
    batch = make_batch([0.1, 0.3])
    raw = {}
    for clip_norm in (0.0, 0.01, 1e6):
        net = make_net()
        assert not make_step(net, dtype=dtype, clip_norm=clip_norm)(cut(batch, 1)).skipped
        raw[clip_norm] = gradient(net)
    norm = float(raw[0.0].norm())
    assert norm > 0.1
    assert float(raw[0.01].norm()) == pytest.approx(0.01, rel=1e-3)
    assert relative_error(raw[0.01], raw[0.0] * (0.01 / norm)) <= 1e-3
    assert torch.equal(raw[1e6], raw[0.0])


@pytest.mark.parametrize("stop", [False, True])
def test_a_wish_to_stop_comes_back_with_the_step_that_was_done(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, stop: bool
) -> None:
    result = make_step(make_net())([make_batch([0.0])], stop=stop)
    assert result.stop is stop
    assert not result.skipped


def test_collate_is_the_inverse_of_cutting(make_batch: MakeBatch) -> None:
    batch = make_batch([0.0, 0.5, 1.0])
    again = collate(cut(batch, 1))
    assert torch.equal(again.image, batch.image)
    assert torch.equal(again.label, batch.label)
    assert torch.equal(again.content, batch.content)
    assert again.keys == batch.keys


def test_a_warm_up_pass_leaves_no_trace(
    make_net: Callable[..., DeepLabV2], make_step: Callable[..., TrainStep]
) -> None:
    net = make_net("local").train()
    step = make_step(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    forwards = []
    net.register_forward_hook(lambda *arguments: forwards.append(True))
    step.warm_up(micro_size=2, crop_size=33)
    assert forwards, "no forward pass was made"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert step.optimizer.state_dict()["state"] == {}


def test_what_a_frozen_layer_multiplies_by_is_computed_once_in_a_run(
    make_net: MakeNet, make_batch: MakeBatch, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = FrozenBatchNorm._compute_scale_and_shift
    monkeypatch.setattr(
        FrozenBatchNorm, "_compute_scale_and_shift", lambda norm: computed.append(norm) or compute(norm)
    )
    net = make_net("frozen")
    step = make_step(net)
    for _ in range(3):
        step([make_batch([0.0]), make_batch([0.5])])
    assert len(computed) == sum(isinstance(module, FrozenBatchNorm) for module in net.modules())
