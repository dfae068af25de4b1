"""One call signature for all arithmetics; an infinite fp16 gradient skips the update and nothing else."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from dist_deeplab.config import load_config
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.training import precision as module
from dist_deeplab.training.precision import Precision, choose_precision

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _problem(seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    return net, torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def _update(precision: Precision, net: nn.Module, x: torch.Tensor, optimizer: SGD, clip_norm: float = 0.0) -> bool:
    optimizer.zero_grad()
    with precision.autocast():
        y = net(x)
    precision.backward(y.float().square().mean())
    return not precision.step(optimizer, clip_norm)[0]


def _state(net: nn.Module, optimizer: SGD) -> list[torch.Tensor]:
    momenta = [optimizer.state[p].get("momentum_buffer") for p in net.parameters()]
    return [t.detach().clone() for t in [*net.parameters(), *momenta] if t is not None]


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state after a way through a file that holds plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_auto_keeps_what_a_run_was_begun_with_and_else_takes_what_the_devices_are_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "fastest_dtype", lambda device: "bf16")
    config, env = load_config(None), DistEnv(device_kind="cpu")
    chosen = [choose_precision(config, env, before=before).precision.dtype for before in (None, "auto", "tf32")]
    assert chosen == ["bf16", "bf16", "tf32"]
    fixed = load_config(None, ["precision.dtype=fp32"])
    assert choose_precision(fixed, env, before="tf32").precision.dtype == "fp32"
    with pytest.raises(UserError, match="fp16 is for GPUs"):
        choose_precision(load_config(None, ["precision.dtype=fp16"]), env, before=None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_computes_in_the_dtype_and_leaves_weights_and_gradients_float32(dtype: str) -> None:
    net, x = _problem()
    precision = Precision(dtype, CPU)
    with precision.autocast():
        assert net(x).dtype == DTYPES[dtype]
    assert net(x).dtype == torch.float32
    assert _update(precision, net, x, SGD(net.parameters(), lr=1e-3))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("tf32", 0.0), ("bf16", 0.05), ("fp16", 0.005)])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_an_update_is_that_of_plain_float32(dtype: str, tolerance: float, clip_norm: float) -> None:
    net, x = _problem()
    assert _update(Precision(dtype, CPU), net, x, SGD(net.parameters(), lr=0.1), clip_norm)
    reference, _ = _problem()
    start = [p.detach().clone() for p in reference.parameters()]
    reference(x).square().mean().backward()
    if clip_norm:
        norm = sum(float(p.grad.double().square().sum()) for p in reference.parameters()) ** 0.5
        assert norm > clip_norm
        for p in reference.parameters():
            p.grad *= clip_norm / norm
    SGD(reference.parameters(), lr=0.1).step()
    for ours, expected, before in zip(net.parameters(), reference.parameters(), start, strict=True):
        move = (expected - before).detach().norm()
        assert (ours - expected).detach().norm() <= (tolerance + 1e-5) * move


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_fp16_skips_an_update_whose_gradient_is_not_finite(bad: float, clip_norm: float) -> None:
    net, x = _problem()
    optimizer, precision = SGD(net.parameters(), lr=0.1, momentum=0.9), Precision("fp16", CPU)
    assert _update(precision, net, x, optimizer)
    before, scale = _state(net, optimizer), precision.scaler.get_scale()

    optimizer.zero_grad()
    precision.backward(net(x).square().mean())
    net[0].weight.grad[0, 0, 0, 0] = bad
    assert precision.step(optimizer, clip_norm)[0]
    assert all(torch.equal(a, b) for a, b in zip(_state(net, optimizer), before, strict=True))
    assert precision.scaler.get_scale() == scale / 2

    assert _update(precision, net, x, optimizer, clip_norm) is True
    assert not any(torch.equal(a, b) for a, b in zip(_state(net, optimizer), before, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_the_norm_is_that_of_all_gradients_before_clipping_and_scaling(dtype: str, clip_norm: float) -> None:
    net, x = _problem()
    optimizer, precision = SGD(net.parameters(), lr=0.1), Precision(dtype, CPU)
    net(x).square().mean().backward()
    net[2].bias.grad = None  # a parameter without gradient counts nothing
    expected = sum(float(p.grad.double().square().sum()) for p in net.parameters() if p.grad is not None) ** 0.5
    optimizer.zero_grad()
    precision.backward(net(x).square().mean())
    net[2].bias.grad = None
    assert float(precision.step(optimizer, clip_norm)[1]) == pytest.approx(expected, rel=1e-5)


def test_an_update_counts_as_done_when_the_scale_grows() -> None:
    net, x = _problem()
    optimizer, precision = SGD(net.parameters(), lr=1e-5), Precision("fp16", CPU)
    precision.scaler.load_state_dict(precision.scaler.state_dict() | {"scale": 8.0, "growth_interval": 1})
    assert _update(precision, net, x, optimizer) is True
    assert precision.scaler.get_scale() == 16.0


def test_the_scalers_state_survives_a_file() -> None:
    net, x = _problem()
    optimizer, precision = SGD(net.parameters(), lr=1e-3), Precision("fp16", CPU)
    _update(precision, net, x, optimizer)
    optimizer.zero_grad()
    precision.backward(net(x).square().mean())
    net[0].weight.grad.fill_(float("inf"))
    precision.step(optimizer, 0.0)
    _update(precision, net, x, optimizer)

    other = Precision("fp16", CPU)
    assert other.state_dict() != precision.state_dict()
    other.load_state_dict(_plain(precision.state_dict()))
    assert other.state_dict() == precision.state_dict()
    assert other.scaler.get_scale() == precision.scaler.get_scale() == 2.0**15  # torch starts at 2^16


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_only_fp16_has_a_state_and_the_others_leave_one_alone(dtype: str) -> None:
    precision = Precision(dtype, CPU)
    assert precision.state_dict() == {}
    precision.load_state_dict(Precision("fp16", CPU).state_dict())
    assert precision.state_dict() == {}


def test_fp16_takes_no_harm_from_another_precisions_empty_state() -> None:
    precision = Precision("fp16", CPU)
    before = precision.state_dict()
    precision.load_state_dict({})
    assert precision.state_dict() == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_torchs_tf32_defaults(dtype: str) -> None:
    for default in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = default
        Precision(dtype, CPU)
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert allowed == ((False, False) if dtype == "fp32" else (True, True))
