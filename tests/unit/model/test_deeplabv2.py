"""The network equals a plain functional DeepLab-v2 written from the paper's prototxt, on one grid with its labels."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import (
    ASPP,
    DeepLabV2,
    MultiScale,
    grid_length,
    output_name,
    resize_input,
    scaled_length,
    upsample,
    upsample_logits,
)

State = dict[str, torch.Tensor]


def _net(backbone: str, num_classes: int = 5, *, stride_on_1x1: bool = True, seed: int = 0) -> DeepLabV2:
    """A network in eval mode whose batch norms have learnt something."""
    torch.manual_seed(seed)
    net = DeepLabV2(backbone, num_classes, norm=norm_factory("local"), stride_on_1x1=stride_on_1x1)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                if name.endswith(("weight", "running_var")):
                    tensor.uniform_(0.5, 1.5)
                elif name.endswith(("bias", "running_mean")):
                    tensor.normal_(0, 0.3)
            elif name.startswith("head.") and name.endswith("bias"):
                tensor.normal_()
    return net.eval()


# --- the reference: DeepLab-v2 ResNet in plain functions on a state dict ----------------------------------------------


def _normalized(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def _reference_logits(state: State, image: torch.Tensor, blocks: list[int], *, stride_on_1x1: bool) -> torch.Tensor:
    x = F.conv2d(image, state["backbone.conv1.weight"], stride=2, padding=3)
    x = F.relu(_normalized(state, "backbone.bn1", x))
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for stage, (num_blocks, stride, rate) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4)), start=1):
        for block in range(num_blocks):
            name = f"backbone.layer{stage}.{block}"
            own = stride if block == 0 else 1
            shortcut = x
            if block == 0:
                shortcut = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=own)
                shortcut = _normalized(state, f"{name}.downsample.1", shortcut)
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=own if stride_on_1x1 else 1)
            y = F.relu(_normalized(state, f"{name}.bn1", y))
            second = 1 if stride_on_1x1 else own
            y = F.conv2d(y, state[f"{name}.conv2.weight"], stride=second, padding=rate, dilation=rate)
            y = F.relu(_normalized(state, f"{name}.bn2", y))
            y = _normalized(state, f"{name}.bn3", F.conv2d(y, state[f"{name}.conv3.weight"]))
            x = F.relu(y + shortcut)
    logits = torch.zeros(())
    for branch, rate in enumerate((6, 12, 18, 24)):
        weight, bias = (state[f"head.branches.{branch}.{key}"] for key in ("weight", "bias"))
        logits = logits + F.conv2d(x, weight, bias, padding=rate, dilation=rate)
    return logits


@pytest.mark.parametrize(("stride_on_1x1", "size"), [(True, (33, 217)), (False, (217, 33))])
@torch.no_grad()
def test_logits_equal_the_reference(stride_on_1x1: bool, size: tuple[int, int]) -> None:
    """On a grid of 28 logits one way: smaller ones don't notice the rate of 24."""
    net = _net("resnet50", 21, stride_on_1x1=stride_on_1x1)
    image = 50 * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    expected = _reference_logits(state, image.double(), [3, 4, 6, 3], stride_on_1x1=stride_on_1x1)
    other = _reference_logits(state, image.double(), [3, 4, 6, 3], stride_on_1x1=not stride_on_1x1)
    logits = net(image)
    assert logits.shape == expected.shape == (1, 21, (size[0] - 1) // 8 + 1, (size[1] - 1) // 8 + 1)
    assert (logits - expected).norm() / expected.norm() <= 1e-5
    assert (other - expected).norm() / expected.norm() > 1e-2  # the placement of the stride makes a difference


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 27, 30), (1, 8, 1, 5), (0, 8, 9, 9)], ids=str)  # beyond and below the rates
def test_aspp_equals_the_sum_of_its_convolutions_with_gradients(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    aspp = ASPP(8, 3).double().to(memory_format=memory_format)  # type: ignore[call-overload]
    inputs = [torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()]
    inputs += list(aspp.parameters())
    ours = aspp(inputs[0])
    theirs = sum(branch(inputs[0]) for branch in aspp.branches)
    slope = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs)
    for name, got, expected in zip(
        ["x", *dict(aspp.named_parameters())],
        torch.autograd.grad(ours, inputs, slope),
        torch.autograd.grad(theirs, inputs, slope),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_compiled_or_exported_aspp_is_the_same_without_fold() -> None:
    torch.manual_seed(0)
    aspp, x = ASPP(8, 3).double(), torch.randn(2, 8, 27, 30, dtype=torch.float64)
    operators: set[str] = set()

    def look(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        operators.update(str(node.target) for node in module.graph.nodes)
        return module

    torch.testing.assert_close(torch.compile(aspp, backend=look)(x), aspp(x))
    program = torch.export.export(aspp, (x,))
    operators.update(str(node.target) for node in program.graph.nodes)
    assert any("conv2d" in name for name in operators)
    assert not any("fold" in name or "col2im" in name for name in operators)
    torch.testing.assert_close(program.module()(x), aspp(x))


def test_no_two_gradients_share_memory() -> None:
    """Clipping multiplies gradients in place: one that is another's memory would be multiplied twice."""
    net = _net("resnet_tiny").train()
    net(torch.randn(2, 3, 33, 33)).sum().backward()
    ranges = sorted(
        (p.grad.data_ptr(), p.grad.data_ptr() + p.grad.numel() * p.grad.element_size()) for p in net.parameters()
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_resnet101_with_21_classes_has_44_048_532_parameters() -> None:
    with torch.device("meta"):
        net = DeepLabV2("resnet101", 21, norm=norm_factory("local"))
    assert sum(p.numel() for p in net.parameters()) == 44_048_532


# --- initial weights --------------------------------------------------------------------------------------------------


def test_the_head_starts_at_n_0_001_with_bias_0() -> None:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 21, norm=norm_factory("local"))
    weights = torch.cat([branch.weight.detach().flatten() for branch in net.head.branches]).double()
    assert weights.numel() == 4 * 21 * 512 * 9
    assert float(weights.mean()) == pytest.approx(0, abs=1e-4)  # 6 standard errors
    assert float(weights.std()) == pytest.approx(0.01, rel=0.01)
    assert float((weights.abs() < 0.01).double().mean()) == pytest.approx(0.6827, abs=0.005)  # normal, not uniform
    assert all(torch.count_nonzero(branch.bias) == 0 for branch in net.head.branches)


def test_the_backbone_starts_he_normal_by_fan_out() -> None:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 21, norm=norm_factory("local"))
    for module in net.backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            few = 5 / module.weight.numel() ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=few)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = (_net("resnet_tiny", seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_a_321_crop_has_logits_of_41_31_and_21() -> None:
    assert [grid_length(321, scale) for scale in (1.0, 0.75, 0.5)] == [41, 31, 21]
    assert [scaled_length(321, scale) for scale in (1.0, 0.75, 0.5)] == [321, 241, 161]


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(9, 130), st.integers(9, 130)),
    scales=st.lists(st.sampled_from([0.25, 0.5, 0.6, 0.75, 0.9]), max_size=3, unique=True),
)
@torch.no_grad()
def test_output_sizes_are_what_the_network_gives(size: tuple[int, int], scales: list[float]) -> None:
    model = MultiScale(_net("resnet_tiny", 2), (1.0, *scales) if scales else ())
    outputs = model(torch.zeros(1, 3, *size))
    assert {name: tuple(logits.shape[2:]) for name, logits in outputs.items()} == model.output_sizes(size)


@torch.no_grad()
def _symmetric(net: DeepLabV2) -> DeepLabV2:
    """Make every kernel mirror-symmetric both ways, so that only the sampling grid can break a symmetry."""
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            once = module.weight + module.weight.flip(2)
            module.weight.copy_((once + once.flip(3)) / 4)
    return net


@pytest.mark.parametrize("stride_on_1x1", [True, False])
@torch.no_grad()
def test_the_grid_of_logits_is_centred_on_a_size_of_8k_plus_1(stride_on_1x1: bool) -> None:
    net = _symmetric(_net("resnet_tiny", stride_on_1x1=stride_on_1x1)).double()
    image = torch.randn(1, 3, 57, 73, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = net(image)
    for axis in (2, 3):
        torch.testing.assert_close(net(image.flip(axis)).flip(axis), logits, rtol=1e-9, atol=1e-9)
    wrong = net(image[:, :, :-1].flip(2)).flip(2)  # 56 rows: corners can't all sit on logits
    assert (wrong - net(image[:, :, :-1])).norm() > 1e-3 * logits.norm()


@pytest.mark.parametrize("stride_on_1x1", [True, False])
@torch.no_grad()
def test_logit_i_j_sees_pixel_8i_8j_in_its_middle(stride_on_1x1: bool) -> None:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 3, norm=norm_factory("local"), stride_on_1x1=stride_on_1x1).eval()
    net = _symmetric(net).double()  # batch norm is 0 and 1, biases 0: a black image has logits 0
    i, j, reach = 22, 26, 9  # the backbone's response to one pixel stays within 9 features
    image = torch.zeros(2, 3, 8 * 40 + 1, 8 * 48 + 1, dtype=torch.float64)
    image[0, :, 8 * i, 8 * j] = 100
    image[1, :, 8 * i + 3, 8 * j] = 100  # a pixel beside it, to see that the check can fail
    window = net.backbone(image)[:, :, i - reach : i + reach + 1, j - reach : j + reach + 1]
    for axis in (2, 3):
        torch.testing.assert_close(window[0].flip(axis - 1), window[0], rtol=1e-9, atol=1e-12)
    assert window[0, :, reach, reach].norm() > 0
    assert (window[1].flip(1) - window[1]).norm() > 1e-3 * window[1].norm()
    rows = [j - d for d in range(15)], [j + d for d in range(15)]
    response = net(image)[0, :, i]
    assert response.norm() > 0
    torch.testing.assert_close(response[:, rows[0]], response[:, rows[1]], rtol=1e-9, atol=1e-12)


# --- multi-scale ------------------------------------------------------------------------------------------------------


def _slow_resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear [B, C, h, w] -> [B, C, *size], the corner pixels' centres on each other."""
    out = np.zeros((*x.shape[:2], *size))
    for i in range(size[0]):
        for j in range(size[1]):
            y = i * (x.shape[2] - 1) / (size[0] - 1)
            z = j * (x.shape[3] - 1) / (size[1] - 1)
            top, left = min(int(y), x.shape[2] - 2), min(int(z), x.shape[3] - 2)
            for dy in (0, 1):
                for dz in (0, 1):
                    share = (1 - abs(y - top - dy)) * (1 - abs(z - left - dz))
                    out[:, :, i, j] += share * x[:, :, top + dy, left + dz]
    return out


@pytest.mark.parametrize("size", [(5, 9), (17, 4), (3, 3)])
def test_upsample_is_bilinear_with_aligned_corners(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    np.testing.assert_allclose(upsample(torch.from_numpy(x), size).numpy(), _slow_resize(x, size), atol=1e-12)


@pytest.mark.parametrize(("size", "new"), [((21, 21), (41, 41)), ((31, 16), (41, 21)), ((1, 3), (7, 3))])
def test_upsample_logits_is_upsample_with_the_same_gradient(size: tuple[int, int], new: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 4, *new, generator=generator)
    ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = upsample_logits(ours, new), upsample(torchs, new)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-6)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-5, atol=1e-5)


def test_upsample_logits_is_float32_under_autocast() -> None:
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = upsample_logits(x, (9, 9))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, upsample(x.float(), (9, 9)), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_multi_scale_outputs_are_each_scales_logits_and_their_maximum_at_the_full_grid() -> None:
    net = _net("resnet_tiny", 3).double()
    image = torch.randn(1, 3, 65, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = MultiScale(net, (0.5, 1.0, 0.75))(image)
    assert set(outputs) == {"fused", "scale_1", "scale_0.75", "scale_0.5"}
    fused = net(image).numpy()
    np.testing.assert_allclose(outputs["scale_1"].numpy(), fused, rtol=1e-10)
    for scale, size in ((0.75, (49, 25)), (0.5, (33, 17))):
        logits = net(torch.from_numpy(_slow_resize(image.numpy(), size))).numpy()
        np.testing.assert_allclose(outputs[f"scale_{scale}"].numpy(), logits, rtol=1e-8, atol=1e-8)
        assert logits.shape[2:] == ((size[0] - 1) // 8 + 1, (size[1] - 1) // 8 + 1)
        fused = np.maximum(fused, _slow_resize(logits, (9, 5)))
    np.testing.assert_allclose(outputs["fused"].numpy(), fused, rtol=1e-8, atol=1e-8)
    assert not np.allclose(fused, outputs["scale_1"].numpy())


@torch.no_grad()
def test_one_scale_has_one_output() -> None:
    net = _net("resnet_tiny", 3)
    image = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(1))
    outputs = MultiScale(net)(image)
    assert list(outputs) == ["scale_1"]
    assert torch.equal(outputs["scale_1"], net(image))
    assert resize_input(image, 1.0) is image


def test_output_names_are_short() -> None:
    assert [output_name(scale) for scale in (1.0, 0.75, 0.5)] == ["scale_1", "scale_0.75", "scale_0.5"]
