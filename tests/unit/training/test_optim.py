"""Learning rates, groups and the update are the published recipe's."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.config import OptimConfig
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.training.optim import (
    build_optimizer,
    describe_groups,
    load_optimizer,
    poly_lr,
    set_lr,
    update_unless,
)


def _net(batch_norm: str = "local") -> DeepLabV2:
    torch.manual_seed(0)
    return DeepLabV2("resnet_tiny", 3, norm=norm_factory(batch_norm))


# --- schedule ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), max_steps=st.integers(1, 50_000), lr=st.floats(1e-6, 1.0), power=st.floats(0, 3))
def test_poly_lr_is_the_papers_formula_at_any_step(
    data: st.DataObject, max_steps: int, lr: float, power: float
) -> None:
    step = data.draw(st.integers(0, max_steps - 1))
    rate = poly_lr(step, OptimConfig(lr=lr, power=power), max_steps=max_steps)
    assert float(rate) == pytest.approx(lr * ((max_steps - step) / max_steps) ** power, rel=1e-9)


def test_the_recipe_starts_at_the_full_base_rate_and_its_last_step_still_moves() -> None:
    recipe = OptimConfig()
    assert poly_lr(0, recipe, max_steps=20_000) == 2.5e-4
    assert float(poly_lr(10_000, recipe, max_steps=20_000)) == pytest.approx(2.5e-4 * 0.5**0.9)
    assert float(poly_lr(19_999, recipe, max_steps=20_000)) == pytest.approx(2.5e-4 * (1 / 20_000) ** 0.9)


def test_warmup_rises_linearly_to_the_schedule() -> None:
    plain, warm = OptimConfig(lr=1.0), OptimConfig(lr=1.0, warmup_steps=4)
    factors = [float(poly_lr(s, warm, max_steps=100) / poly_lr(s, plain, max_steps=100)) for s in range(100)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + 97 * [1.0])


def test_set_lr_multiplies_the_base_rate_for_every_group() -> None:
    optimizer = build_optimizer(_net(), OptimConfig())
    rates = set_lr(optimizer, torch.tensor(0.5))
    assert rates == {"backbone": 0.5, "batch_norm": 0.5, "head_weight": 5.0, "head_bias": 10.0}
    assert [group["lr"] for group in optimizer.param_groups] == list(rates.values())


# --- groups -----------------------------------------------------------------------------------------------------------


def _group_of(name: str) -> str:
    """Which group a parameter belongs to, told by its name."""
    if name.startswith("head."):
        return "head_weight" if name.endswith("weight") else "head_bias"
    return "batch_norm" if ".bn" in name or "downsample.1." in name else "backbone"


@pytest.mark.parametrize("batch_norm", ["sync", "local", "frozen"])
def test_every_trainable_parameter_is_in_exactly_one_group(batch_norm: str) -> None:
    net = _net(batch_norm)
    optimizer = build_optimizer(net, OptimConfig())
    expected: dict[str, list[int]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            expected.setdefault(_group_of(name), []).append(id(parameter))
    assert {g["name"]: [id(p) for p in g["params"]] for g in optimizer.param_groups} == expected
    assert ("batch_norm" in expected) == (batch_norm != "frozen")


def test_multipliers_are_1_10_20_and_only_weights_of_convolutions_decay() -> None:
    optimizer = build_optimizer(_net(), OptimConfig(lr=1e-3, weight_decay=0.5, momentum=0.75))
    values = {g["name"]: (g["lr_mult"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert values == {
        "backbone": (1.0, pytest.approx(1e-3), 0.5),
        "batch_norm": (1.0, pytest.approx(1e-3), 0.0),
        "head_weight": (10.0, pytest.approx(1e-2), 0.5),
        "head_bias": (20.0, pytest.approx(2e-2), 0.0),
    }
    assert {(g["momentum"], g["dampening"], g["nesterov"]) for g in optimizer.param_groups} == {(0.75, 0, False)}


def test_describe_groups_has_a_line_for_each_group_with_its_size() -> None:
    net = _net()
    lines = describe_groups(build_optimizer(net, OptimConfig()))
    assert [line.split()[0] for line in lines] == ["backbone", "batch_norm", "head_weight", "head_bias"]
    head_weights = 4 * 3 * 512 * 9
    assert f" 4 tensors {head_weights:>11,} parameters  lr x10   weight decay 0.0005" in lines[2]
    assert " 4 tensors          12 parameters  lr x20   weight decay 0" in lines[3]


# --- update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_three_updates_equal_slow_sgd_with_momentum_and_decay(memory_format: torch.memory_format) -> None:
    net, config, max_steps = _net(), OptimConfig(lr=0.02, weight_decay=0.1), 5
    optimizer = build_optimizer(net, config)
    net.to(memory_format=memory_format)
    expected = {name: p.detach().double().numpy().copy() for name, p in net.named_parameters()}
    velocity = {name: np.zeros_like(value) for name, value in expected.items()}
    rng = np.random.default_rng(0)
    for step in range(3):
        set_lr(optimizer, poly_lr(step, config, max_steps=max_steps))
        for name, parameter in net.named_parameters():
            gradient = rng.normal(size=parameter.shape).astype(np.float32)
            parameter.grad = torch.empty_like(parameter).copy_(torch.from_numpy(gradient))
            multiplier, decay = {
                "backbone": (1, 0.1),
                "batch_norm": (1, 0.0),
                "head_weight": (10, 0.1),
                "head_bias": (20, 0.0),
            }[_group_of(name)]
            velocity[name] = 0.9 * velocity[name] + gradient + decay * expected[name]
            expected[name] = expected[name] - multiplier * 0.02 * (1 - step / 5) ** 0.9 * velocity[name]
        update_unless(optimizer, torch.tensor(False))
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_skipped_update_changes_nothing_and_the_next_one_is_the_first() -> None:
    net, other = _net(), _net()
    optimizers = [build_optimizer(each, OptimConfig(lr=0.02)) for each in (net, other)]
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    update_unless(optimizers[0], torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    for each, optimizer in zip((net, other), optimizers, strict=True):
        for parameter in each.parameters():
            parameter.grad = torch.ones_like(parameter)
        update_unless(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_momenta_come_back_in_the_memory_format_of_their_parameters() -> None:
    """A file, or a copy made for it, may hold them in another one; fused SGD would pair up wrong elements."""
    net, other = _net().to(memory_format=torch.channels_last), _net().to(memory_format=torch.channels_last)
    optimizer, resumed = (build_optimizer(each, OptimConfig(lr=0.02)) for each in (net, other))
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in net.parameters()]
    for number in range(2):
        if number == 1:
            state = optimizer.state_dict()
            state["state"] = {
                key: {"momentum_buffer": values["momentum_buffer"].contiguous()}
                for key, values in state["state"].items()
            }
            load_optimizer(resumed, state)
            other.load_state_dict(net.state_dict())
        for each, own in ((net, optimizer), (other, resumed))[: number + 1]:
            for parameter, gradient in zip(each.parameters(), gradients, strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            update_unless(own, torch.tensor(False))
    for ours, expected in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, expected)


class Plain(torch.optim.SGD):
    """An optimizer that decides nothing on the device, and takes plain numbers as rates."""

    _step_supports_amp_scaling = False

    def step(self, closure: Any = None) -> None:
        assert all(type(group["lr"]) is float for group in self.param_groups)
        super().step(closure)


def test_settings_of_a_checkpoint_do_not_replace_those_of_the_configuration() -> None:
    net = _net()
    saved = build_optimizer(net, OptimConfig(weight_decay=0.1, momentum=0.5)).state_dict()
    optimizer = build_optimizer(net, OptimConfig(weight_decay=0.2, momentum=0.8))
    load_optimizer(optimizer, saved)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_an_optimizer_that_cannot_skip_by_itself_is_not_called() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Plain([{"params": [parameter], "name": "all", "lr_mult": 2.0}], lr=1.0)
    set_lr(optimizer, torch.tensor(0.25))
    parameter.grad = torch.ones(3)
    update_unless(optimizer, torch.tensor(True))
    assert torch.equal(parameter, torch.ones(3))
    update_unless(optimizer, torch.tensor(False))
    assert torch.equal(parameter, torch.full((3,), 0.5))


# --- parameters that fit no group, or two -----------------------------------------------------------------------------


def test_a_parameter_of_a_new_kind_of_layer_is_an_error_that_names_it() -> None:
    net = _net()
    net.backbone.layer4[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"backbone\.layer4\.0\.extra\.weight of a Linear belongs to no"):
        build_optimizer(net, OptimConfig())


def test_a_backbone_convolution_with_a_bias_is_an_error() -> None:
    net = _net()
    net.backbone.conv1.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match=r"backbone\.conv1\.bias of a Conv2d belongs to no"):
        build_optimizer(net, OptimConfig())


def test_a_parameter_shared_by_two_groups_is_an_error_that_names_both_places() -> None:
    net = _net()
    net.head.branches[0].bias = net.backbone.bn1.bias
    with pytest.raises(ValueError, match=r"head\.branches\.0\.bias .* as backbone\.bn1\.bias \(batch_norm\)"):
        build_optimizer(net, OptimConfig())
