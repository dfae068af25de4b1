"""What the doctor says about a run from measured rates: each part's seconds a step, which of them limits it, advice."""

import dataclasses

import pytest

from dist_deeplab.config import load_config
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2, MultiScale
from dist_deeplab.model.flops import training_flops
from dist_deeplab.training.rates import Forecast, Rates, forecast

FAST = Rates(1e15, 1e15, 1e15, loader_images_per_s=1e9, all_reduce_bytes_per_s=1e15)


def forecast_of(rates: Rates, *overrides: str, world_size: int = 2) -> Forecast:
    """The forecast of 100 steps of 8 images of 65 x 65 by a small network."""
    settings = ["model.backbone=resnet_tiny", "data.crop_size=65", "max_steps=100", "batch.global_size=8"]
    split = BatchSplit.derive(global_size=8, micro_size=None, world_size=world_size)
    return forecast(load_config(None, [*settings, *overrides]), DistEnv(world_size=world_size), split, rates)


def test_each_part_is_its_amount_over_its_rate() -> None:
    network = DeepLabV2("resnet_tiny", 21, norm=norm_factory("frozen"))
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    rates = Rates(1e9, 2e9, 1e6, loader_images_per_s=20.0, all_reduce_bytes_per_s=1e6)
    found = forecast_of(rates)
    assert found.loader_s == 4 / 20
    assert found.all_reduce_s == pytest.approx(4 * num_parameters / 1e6)
    assert found.host_to_device_s == pytest.approx(4 * 65 * 65 * (3 + 1) / 1e6), "3 bytes of colour and a label each"
    assert found.compute_s == pytest.approx(4 * training_flops(MultiScale(network), (65, 65)) / 2e9)
    alone = forecast_of(rates, world_size=1)
    assert alone.compute_s == pytest.approx(2 * found.compute_s), "8 images instead of 4"
    slower = forecast_of(dataclasses.replace(rates, conv_flops_per_s=1e9))
    assert slower.compute_s == pytest.approx(2 * found.compute_s)
    three_scales = forecast_of(rates, "multi_scale.scales=[1.0,0.75,0.5]")
    assert 1.5 < three_scales.compute_s / found.compute_s < 2.2, "1 + 0.75^2 + 0.5^2 of the pixels, about"


def test_what_was_not_measured_takes_no_time() -> None:
    found = forecast_of(dataclasses.replace(FAST, loader_images_per_s=None, all_reduce_bytes_per_s=None))
    assert (found.loader_s, found.all_reduce_s) == (0, 0)


@pytest.mark.parametrize(
    ("slow", "limit", "advice"),
    [
        ("conv_flops_per_s", "compute", "precision.dtype=bf16"),
        ("loader_images_per_s", "loader", "data.num_workers=4"),
        ("all_reduce_bytes_per_s", "all-reduce", "speed.compress_gradients=true"),
        ("host_to_device_bytes_per_s", "host-to-device copies", "pinned memory"),
    ],
)
def test_the_slowest_part_limits_the_run_and_has_its_own_advice(slow: str, limit: str, advice: str) -> None:
    found = forecast_of(dataclasses.replace(FAST, **{slow: 1.0}), "data.num_workers=4", "precision.dtype=fp32")
    slowest = max(found.compute_s, found.loader_s, found.all_reduce_s, found.host_to_device_s)
    assert found.limit == limit
    assert advice in found.advice
    assert found.run_s == pytest.approx(100 * slowest)
    assert f"limited by {limit}" in str(found)


def test_a_run_in_lower_precision_is_not_told_to_use_it() -> None:
    slow = dataclasses.replace(FAST, conv_flops_per_s=1.0)
    assert forecast_of(slow, "precision.dtype=bf16").advice == "more GPUs"
