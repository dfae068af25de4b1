"""Recomputed activations change memory and nothing else: same bits of output, gradients and running statistics."""

import contextlib
from typing import Literal

import pytest
import torch

from dist_deeplab.model import recompute
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2

Mode = Literal["sync", "frozen", "local"]


def network(mode: Mode, *, recompute: bool) -> DeepLabV2:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory(mode), recompute=recompute)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    for parameter in net.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))  # every branch contributes
    return net


def one_step(net: DeepLabV2, train: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of a fixed batch, and all gradients and buffers after two passes."""
    net.train(train)
    image = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        logits = net(image)
        logits.square().sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return logits.detach(), {**grads, **dict(net.named_buffers())}


@pytest.mark.parametrize("mode", ["sync", "frozen", "local"])
def test_outputs_gradients_and_statistics_are_bit_identical(mode: Mode) -> None:
    logits, tensors = one_step(network(mode, recompute=False))
    again, others = one_step(network(mode, recompute=True))
    assert torch.equal(logits, again)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def test_without_care_the_statistics_would_move_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    _, tensors = one_step(network("local", recompute=False))
    monkeypatch.setattr(recompute, "_statistics_kept", lambda block: contextlib.nullcontext())
    _, others = one_step(network("local", recompute=True))
    assert not all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def saved_bytes(net: DeepLabV2) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = sum(p.untyped_storage().nbytes() for p in net.parameters())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = net.train()(torch.randn(2, 3, 129, 129))
    logits.sum().backward()
    return sum(storages.values()) - kept


def test_it_keeps_a_fraction_of_the_activations() -> None:
    assert saved_bytes(network("local", recompute=True)) < 0.6 * saved_bytes(network("local", recompute=False))


def test_evaluation_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_deeplab.model.resnet.recomputed", lambda block, x: pytest.fail("recomputed in eval mode"))
    one_step(network("sync", recompute=True), train=False)
