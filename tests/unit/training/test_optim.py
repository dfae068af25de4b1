"""Learning rates, groups and the update are the published recipe's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.config import OptimConfig
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from dist_deeplab.training.optim import build_optimizer, describe_groups, poly_lr, set_lr


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
    assert rate == pytest.approx(lr * ((max_steps - step) / max_steps) ** power, rel=1e-9)


def test_the_recipe_starts_at_the_full_base_rate_and_its_last_step_still_moves() -> None:
    recipe = OptimConfig()
    assert poly_lr(0, recipe, max_steps=20_000) == 2.5e-4
    assert poly_lr(10_000, recipe, max_steps=20_000) == pytest.approx(2.5e-4 * 0.5**0.9)
    assert poly_lr(19_999, recipe, max_steps=20_000) == pytest.approx(2.5e-4 * (1 / 20_000) ** 0.9)


def test_warmup_rises_linearly_to_the_schedule() -> None:
    plain, warm = OptimConfig(lr=1.0), OptimConfig(lr=1.0, warmup_steps=4)
    factors = [poly_lr(s, warm, max_steps=100) / poly_lr(s, plain, max_steps=100) for s in range(100)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + 97 * [1.0])


def test_set_lr_multiplies_the_base_rate_for_every_group() -> None:
    optimizer = build_optimizer(_net(), OptimConfig())
    rates = set_lr(optimizer, 0.5)
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


def test_three_updates_equal_slow_sgd_with_momentum_and_decay() -> None:
    net, config, max_steps = _net(), OptimConfig(lr=0.02, weight_decay=0.1), 5
    optimizer = build_optimizer(net, config)
    expected = {name: p.detach().double().numpy().copy() for name, p in net.named_parameters()}
    velocity = {name: np.zeros_like(value) for name, value in expected.items()}
    rng = np.random.default_rng(0)
    for step in range(3):
        set_lr(optimizer, poly_lr(step, config, max_steps=max_steps))
        for name, parameter in net.named_parameters():
            gradient = rng.normal(size=parameter.shape).astype(np.float32)
            parameter.grad = torch.from_numpy(gradient)
            multiplier, decay = {
                "backbone": (1, 0.1),
                "batch_norm": (1, 0.0),
                "head_weight": (10, 0.1),
                "head_bias": (20, 0.0),
            }[_group_of(name)]
            velocity[name] = 0.9 * velocity[name] + gradient + decay * expected[name]
            expected[name] = expected[name] - multiplier * 0.02 * (1 - step / 5) ** 0.9 * velocity[name]
        optimizer.step()
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
