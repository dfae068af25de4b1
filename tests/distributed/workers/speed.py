"""On every rank: the speed options that touch communication give the plain step's gradients and statistics."""

import torch

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.runtime.distributed import DistEnv, leave, process_group
from dist_deeplab.runtime.parallel import prepare_model, unwrap


def step(env: DistEnv, *, recompute: bool = False, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all gradients and all buffers after two passes, as vectors."""
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync"), recompute=recompute)
    model = prepare_model(MultiScale(net, ()), env, **options).train()
    image = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(env.rank))
    for _ in range(2):
        sum(logits.square().sum() for logits in model(image).values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in unwrap(model).parameters() if p.grad is not None])
    return gradient, torch.cat([buffer.flatten().double() for buffer in model.buffers()])


def main(env: DistEnv) -> None:
    gradient, buffers = step(env)
    other, others = step(env, recompute=True)
    torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(others, buffers), "recomputation moved the running statistics"
    compressed, others = step(env, compress_gradients=True)
    error = float((compressed - gradient).norm() / gradient.norm())
    assert 1e-5 < error < 1e-2, f"bf16 keeps 8 bits of each gradient; relative error {error}"
    assert torch.equal(others, buffers)


if __name__ == "__main__":
    this = DistEnv.from_environ()
    with process_group(this):
        main(this)
    leave(0)
