"""Speed options change the time and the memory of a step, not what it computes."""

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_deeplab.distributed import parallel
from dist_deeplab.distributed.parallel import prepare_model, separate_group
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale

ALONE = DistEnv()


def prepared(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 5, norm=norm_factory("sync"))
    return prepare_model(MultiScale(net, (1.0, 0.5)), ALONE, **options).train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    image = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    sum(logits.square().sum() for logits in model(image).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_memory_format_follows_the_option() -> None:
    weight = dict(prepared().named_parameters())["net.backbone.layer2.0.conv2.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    weight = dict(prepared(channels_last=False).named_parameters())["net.backbone.layer2.0.conv2.weight"]
    assert weight.is_contiguous()


def test_compiled_network_has_the_same_gradients_and_parameter_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tracing backend: the generated code itself is `benchmark.py step --ours fp32+compile`'s to run."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: _compile_traced(self, dynamic))
    expected, got = gradients(prepared()), gradients(prepared(compile=True))
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def _compile_traced(module: nn.Module, dynamic: bool) -> None:
    compiled = torch.compile(module._call_impl, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    module._compiled_call_impl = compiled  # type: ignore[assignment]


def test_another_group_waits_as_long_as_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, cpu = datetime.timedelta(seconds=4711), torch.device("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    try:
        monkeypatch.setattr(parallel, "get_world_size", lambda: 2)
        group = separate_group(cpu)
        assert group is not None
        assert group._get_backend(cpu).options._timeout == limit
    finally:
        dist.destroy_process_group()
