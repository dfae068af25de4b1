"""Whole optimizer steps of the package equal those of a reference written from first principles."""

import numpy as np
import pytest
import torch

from dist_deeplab.config import OptimConfig, load_config
from dist_deeplab.data.loader import Batch
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import build_loss, build_model, network_variant
from dist_deeplab.training.data_builders import build_augmentation
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer, poly_lr, set_lr
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep
from tests.reference import deeplab

CLASSES, BLOCKS = 6, (1, 1, 2, 1)  # resnet_tiny
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.05)
MAX_STEPS = 12


def _network(batch_norm: str, seed: int) -> DeepLabV2:
    """A network whose statistics and affine parameters are far from 0 and 1, and whose head prefers some classes."""
    torch.manual_seed(seed)
    net = DeepLabV2("resnet_tiny", CLASSES, norm=norm_factory(batch_norm))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(2.0, 4.0)
            elif ".bn" in name or "downsample.1." in name:
                tensor.uniform_(0.5, 1.5) if name.endswith("weight") else tensor.copy_(0.3 * torch.randn(tensor.shape))
            elif name.startswith("head."):
                tensor.mul_(3) if name.endswith("weight") else tensor.normal_()
    return net.train()


def _batch(rng: np.random.Generator, images: int, size: int, void: float) -> Batch:
    label = rng.integers(0, CLASSES, (images, size, size), dtype=np.uint8)
    label[rng.random(label.shape) < void] = 255
    content = [(size, size - 8 * (b % 2)) for b in range(images)]
    image = rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8)
    keys = [str(b) for b in range(images)]
    return Batch(torch.from_numpy(image), torch.from_numpy(label), torch.tensor(content), keys)


def _relative_error(values: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    assert values.keys() == reference.keys()
    difference = sum(float((values[name].double() - reference[name]).square().sum()) for name in reference)
    return (difference / sum(float(value.square().sum()) for value in reference.values())) ** 0.5


@pytest.mark.quick("P7")
@pytest.mark.parametrize(
    ("batch_norm", "scales", "voids", "num_steps"),
    [
        ("frozen", (1.0,), [[0.1], [0.9], [1.0]], 3),  # three steps; the third has no valid pixel at all
        ("frozen", (1.0, 0.75, 0.5), [[0.2, 0.95], [0.0, 1.0]], 2),  # multi-scale, accumulated, unequal void
        ("sync", (1.0, 0.5), [[0.3]], 1),  # statistics of the batch itself, and their gradient
    ],
    ids=["frozen", "multi-scale, accumulated", "batch norm trained"],
)
def test_whole_steps_equal_the_reference(
    batch_norm: str,
    scales: tuple[float, ...],
    voids: list[list[float]],
    num_steps: int,
) -> None:
    net = _network(batch_norm, seed=3).to(memory_format=torch.channels_last)
    p = {name: tensor.detach().double().clone() for name, tensor in net.state_dict().items()}
    start = dict(p)
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    velocity: dict[str, torch.Tensor] = {}
    optimizer = build_optimizer(net, OPTIM)
    model = MultiScale(net, scales if len(scales) > 1 else ())
    update = TrainStep(model, optimizer, Precision("fp32", torch.device("cpu")), CAFFE, CrossEntropy(255))
    rng = np.random.default_rng(7)
    for step in range(num_steps):
        batches = [_batch(rng, 2, 33, void) for void in voids[step]]
        losses, gradient = deeplab.whole_step(
            p,
            velocity,
            trainable,
            [(b.image.numpy(), b.label.numpy(), [tuple(c) for c in b.content.tolist()]) for b in batches],
            blocks=BLOCKS,
            scales=scales,
            step=step,
            max_steps=MAX_STEPS,
            lr=OPTIM.lr,
            momentum=OPTIM.momentum,
            weight_decay=OPTIM.weight_decay,
            trained_norm=batch_norm == "sync",
        )
        set_lr(optimizer, poly_lr(step, OPTIM, max_steps=MAX_STEPS))
        result = update(batches)
        assert [float(loss) for loss in result.losses.values()] == pytest.approx(losses, rel=2e-5, abs=1e-7)
        if any(losses):
            ours = {name: q.grad for name, q in net.named_parameters() if q.requires_grad}
            assert _relative_error(ours, gradient) < (1e-4 if batch_norm == "frozen" else 1e-3)
    final = dict(net.named_parameters())
    moved = {name: final[name].detach().double() - start[name] for name in trainable}
    assert _relative_error(moved, {name: p[name] - start[name] for name in trainable}) < 1e-3
    assert not any(torch.equal(moved[name], torch.zeros_like(moved[name])) for name in trainable)


def test_the_authors_recipe_is_their_solver_term_by_term() -> None:
    """Losses, gradient and random scales of configs/voc_resnet101_authors.yaml; uneven void, one image all void."""
    config = load_config("voc_resnet101_authors", ["model.backbone=resnet_tiny", f"data.num_classes={CLASSES}"])
    assert config.model.batch_norm == "frozen"
    net = _network(config.model.batch_norm, seed=3)
    p = {name: tensor.detach().double().clone() for name, tensor in net.state_dict().items()}
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    batch = _batch(np.random.default_rng(7), 4, 33, 0.1)
    batch.label[0, 4:] = 255
    batch.label[1] = 255
    content = [(rows, columns) for rows, columns in batch.content.tolist()]
    losses, gradient = deeplab.authors_gradient(p, trainable, batch.image.numpy(), batch.label.numpy(), content, BLOCKS)
    model = build_model(config, DistEnv(), net)
    preprocessing = network_variant(config, SCRATCH).preprocessing
    precision = Precision("fp32", torch.device("cpu"))
    update = TrainStep(model, build_optimizer(net, config.optim), precision, preprocessing, build_loss(config))
    set_lr(update.optimizer, poly_lr(0, config.optim, max_steps=MAX_STEPS))
    result = update([batch])
    assert [float(loss) for loss in result.losses.values()] == pytest.approx(losses, rel=2e-5)
    ours = {name: q.grad for name, q in net.named_parameters() if q.requires_grad}
    assert _relative_error(ours, gradient) < 1e-4
    draws = [build_augmentation(config).scale_of(draw) for draw in np.arange(0, 1, 0.01)]
    assert {scale: draws.count(scale) for scale in draws} == dict.fromkeys((0.5, 0.75, 1.0, 1.25, 1.5), 20)


def test_each_of_the_authors_terms_is_needed_for_that() -> None:
    """The test above can fail: leaving out a single term is another gradient."""
    terms = ("loss.average=pixels", "multi_scale.full_grid=[]", "model.mean_bgr=[]")
    whole = _authors_step()
    for term, least in zip(terms, (1e-1, 1e-2, 1e-5), strict=True):
        assert _relative_error(_authors_step(term), whole) > least, term


def _authors_step(*overrides: str) -> dict[str, torch.Tensor]:
    """Gradient of one step of the authors' recipe, changed by `overrides`."""
    small = ["model.backbone=resnet_tiny", f"data.num_classes={CLASSES}"]
    config = load_config("voc_resnet101_authors", [*small, *overrides])
    net = _network("frozen", seed=3)
    batch = _batch(np.random.default_rng(7), 4, 33, 0.1)
    batch.label[0, 4:] = 255
    model, precision = build_model(config, DistEnv(), net), Precision("fp32", torch.device("cpu"))
    preprocessing = network_variant(config, SCRATCH).preprocessing
    TrainStep(model, build_optimizer(net, config.optim), precision, preprocessing, build_loss(config))([batch])
    return {name: p.grad.double() for name, p in net.named_parameters() if p.requires_grad and p.grad is not None}


@torch.no_grad()
def test_logits_of_the_real_depth_equal_the_reference() -> None:
    """ResNet-50's blocks on a grid on which all rates of the head count."""
    torch.manual_seed(1)
    net = DeepLabV2("resnet50", 21, norm=norm_factory("frozen")).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    image = 50 * torch.randn(1, 3, 33, 209, generator=torch.Generator().manual_seed(2))
    p = {name: tensor.double() for name, tensor in net.state_dict().items()}
    expected = deeplab.logits(p, image.double(), (3, 4, 6, 3), trained=False)
    assert (net(image) - expected).norm() / expected.norm() < 1e-5
