"""On every rank: the speed options that touch communication give the plain step's gradients and statistics."""

import torch

from dist_deeplab.config import OptimConfig
from dist_deeplab.data.batch import Batch
from dist_deeplab.distributed.parallel import prepare_model, unwrap
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.training.loss import CrossEntropy
from dist_deeplab.training.optim import build_optimizer
from dist_deeplab.training.precision import Precision
from dist_deeplab.training.step import TrainStep


def step(env: DistEnv, *, recompute: bool = False, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All gradients and all buffers after two passes, as vectors."""
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync"), recompute=recompute)
    model = prepare_model(MultiScale(net, ()), env, **options).train()
    image = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(env.rank))
    for _ in range(2):
        sum(logits.square().sum() for logits in model(image).values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in unwrap(model).parameters() if p.grad is not None])
    return gradient, torch.cat([buffer.flatten().double() for buffer in model.buffers()])


def updated(
    env: DistEnv, *, static_graph: bool, recompute: bool = False, scales: tuple[float, ...] = ()
) -> torch.Tensor:
    """All weights and statistics after updates of two, one and two micro-batches, as one vector."""
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync"), recompute=recompute)
    model = prepare_model(MultiScale(net, scales), env, static_graph=static_graph).train()
    optimizer, precision = build_optimizer(net, OptimConfig()), Precision("fp32", env.device)
    update = TrainStep(model, optimizer, precision, CAFFE, CrossEntropy(255))
    update.warm_up(micro_size=2, crop_size=65)
    generator = torch.Generator().manual_seed(env.rank)
    for accumulation in (2, 1, 2):
        images = torch.randint(0, 256, (accumulation, 2, 3, 65, 65), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 5, (accumulation, 2, 65, 65), dtype=torch.uint8, generator=generator)
        content = torch.full((2, 2), 65)
        update([Batch(image, label, content, ["a", "b"]) for image, label in zip(images, labels, strict=True)])
    return torch.cat([tensor.flatten().double() for tensor in net.state_dict().values()])


def main(env: DistEnv) -> None:
    gradient, buffers = step(env)
    other, others = step(env, recompute=True)
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(others, buffers), "recomputation moved the running statistics"
    compressed, others = step(env, compress_gradients=True)
    error = float((compressed - gradient).norm() / gradient.norm())
    assert 1e-5 < error < 1e-2, f"bf16 keeps 8 bits of each gradient; relative error {error}"
    assert torch.equal(others, buffers)
    static, others = step(env, static_graph=True)
    torch.testing.assert_close(static, gradient, rtol=1e-5, atol=1e-5)  # other buckets in the first pass
    assert torch.equal(others, buffers)
    for options in ({}, {"recompute": True}, {"scales": (1.0, 0.5)}):
        plain, static = (updated(env, static_graph=static, **options) for static in (False, True))
        assert torch.equal(static, plain), f"static_graph with {options} changed the weights"
