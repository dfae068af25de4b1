"""A network small enough for a CPU, whose batch norms have seen data, and batches to train it on."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.loader import Batch
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep
from tests.networks import discerning_network

NUM_CLASSES, IGNORE, CROP = 5, 255, 33


@pytest.fixture(autouse=True)
def torchs_own_tf32() -> Iterator[None]:
    """`Precision` sets torch's global flags; leave them as they were."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.fixture(scope="session")
def trained_state() -> dict[str, torch.Tensor]:
    """Random weights, and the statistics of random images in every batch norm."""
    images = torch.randint(0, 256, (8, 3, 65, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = discerning_network(NUM_CLASSES, CAFFE.normalize(images, torch.tensor([[65, 65]] * 8)))
    with torch.no_grad():
        for branch in net.head.branches:
            branch.weight.mul_(10)  # far from the uniform prediction, so that losses and gradients differ much
    return net.state_dict()


@pytest.fixture
def make_net(trained_state: dict[str, torch.Tensor]) -> Callable[..., DeepLabV2]:
    def make_net(batch_norm: str = "frozen") -> DeepLabV2:
        net = DeepLabV2("resnet_tiny", NUM_CLASSES, norm=norm_factory(batch_norm))
        net.load_state_dict(trained_state)
        return net.train()

    return make_net


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make_batch(void_shares: list[float], seed: int = 1) -> Batch:
        """Random images with random labels, the upper share of each void; every second image is padded on the right."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(void_shares), CROP, CROP)
        image = torch.randint(0, 256, (shape[0], 3, CROP, CROP), dtype=torch.uint8, generator=generator)
        label = torch.randint(0, NUM_CLASSES, shape, dtype=torch.uint8, generator=generator)
        for one, share in zip(label, void_shares):
            one[: round(share * CROP)] = IGNORE
        content = torch.tensor([[CROP, CROP - 8 * (i % 2)] for i in range(shape[0])])
        return Batch(image, label, content, [f"image_{i}" for i in range(shape[0])])

    return make_batch


@pytest.fixture
def make_step() -> Callable[..., TrainStep]:
    def make_step(
        net: DeepLabV2,
        *,
        scales: tuple[float, ...] = (),
        dtype: str = "fp32",
        clip_norm: float = 0.0,
        optim: OptimConfig | None = None,
        loss: CrossEntropy | None = None,
    ) -> TrainStep:
        optimizer = build_optimizer(net, optim or OptimConfig())
        precision = Precision(dtype, torch.device("cpu"))
        if dtype == "fp16":  # torch starts at 2^16 and skips updates until the scale fits; here every step counts
            precision.scaler.load_state_dict(precision.scaler.state_dict() | {"scale": 2.0**10})
        return TrainStep(MultiScale(net, scales), optimizer, precision, CAFFE, loss or CrossEntropy(IGNORE), clip_norm)

    return make_step
