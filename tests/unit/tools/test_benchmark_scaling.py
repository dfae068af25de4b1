"""The modelled GPU, scenarios of a cluster, and the command `scaling`."""

import json
from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
import torch
from benchmarks.events import ModelClock, Workload, measured_events, modelled_events
from benchmarks.modelled_gpu import H100, GpuModel
from benchmarks.network import Nccl
from benchmarks.scenario import CHANGES, Scenario
from benchmarks.stragglers import Stragglers
from benchmarks.timeline import Event
from torch import nn

from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2
from tests.unit.tools.test_benchmark import run_benchmark

SMALL = Workload("resnet_tiny", 33, 1, "sync", 64)


def modelled(function: nn.Module, *inputs: torch.Tensor) -> GpuModel:
    model = GpuModel(H100)
    with model:
        function(*inputs)
    return model


def test_a_convolution_takes_its_arithmetic_and_a_cast_of_its_weight() -> None:
    layer = nn.Conv2d(512, 512, 3, padding=1, bias=False, device="meta")
    image = torch.empty(10, 512, 41, 41, device="meta")
    model = modelled(layer, image)
    flops = 2 * 10 * 41 * 41 * 512 * 512 * 9
    cast_s = (4 + 2) * 512 * 512 * 9 / H100.memory_bandwidth
    assert model.launches == 2
    assert model.seconds == pytest.approx(flops / H100.matmul_flops + cast_s)
    with model:
        layer(image.requires_grad_()).sum().backward()
    gradients = model.seconds - 2 * (flops / H100.matmul_flops + cast_s)
    assert gradients == pytest.approx(2 * flops / H100.matmul_flops + cast_s, rel=0.1)  # and sum and its gradient


def test_a_pointwise_kernel_takes_its_bytes_in_bf16_or_the_shortest_time() -> None:
    large, small = torch.empty(10, 512, 41, 41, device="meta"), torch.empty(10, 8, 4, 4, device="meta")
    relu = nn.ReLU()
    assert modelled(relu, large).seconds == pytest.approx(2 * 2 * large.numel() / H100.memory_bandwidth)
    assert modelled(relu, small).seconds == H100.kernel_s
    views = modelled(nn.Flatten(0), small)
    assert (views.seconds, views.launches) == (0, 0)


def test_batch_norm_passes_three_times_over_its_input() -> None:
    image = torch.empty(10, 512, 41, 41, device="meta")
    model = modelled(nn.BatchNorm2d(512, device="meta").train(), image)
    assert model.seconds == pytest.approx(
        3 * 2 * image.numel() / H100.memory_bandwidth + H100.kernel_s, rel=0.01
    )  # and its counter of batches


@pytest.mark.parametrize(("ranks", "kind"), [(8, "gather"), (64, "sum")])
def test_batch_norm_communicates_once_per_layer_and_direction(ranks: int, kind: str) -> None:
    events = modelled_events(replace(SMALL, ranks=ranks), H100)
    net = DeepLabV2("resnet_tiny", 21, norm=norm_factory("sync"))
    channels = [layer.num_features for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    collectives = [event for event in events if event.kind in ("gather", "sum")]
    forward, backward = collectives[: len(channels)], collectives[len(channels) :]
    assert {event.kind for event in forward} == {kind}
    width = 4 if kind == "gather" else 8
    assert sorted(event.num_bytes for event in forward) == sorted(width * (2 * number + 1) for number in channels)
    assert sorted(event.num_bytes for event in backward) == sorted(4 * 2 * number for number in channels)
    assert {event.kind for event in backward} == {"sum"}


def test_all_gradients_travel_in_buckets_and_the_update_comes_last() -> None:
    events = modelled_events(SMALL, H100)
    net = DeepLabV2("resnet_tiny", 21, norm=norm_factory("sync"))
    sizes = [event.num_bytes for event in events if event.kind == "bucket"]
    assert sum(sizes) == 4 * sum(p.numel() for p in net.parameters())
    assert [event.kind for event in events[-2:]] == ["wait", "end"]
    alone = modelled_events(replace(SMALL, ranks=1), H100)
    assert [event.kind for event in alone] == ["wait", "end"]
    assert sum(event.launches for event in alone) < sum(event.launches for event in events)


def test_collectives_are_launched_too_and_ddp_copies_gradients_into_its_buckets() -> None:
    clock = ModelClock(GpuModel(H100))
    clock.collective("sum", 8)
    clock.mark("gradient", 40_000_000)
    assert clock.events == [Event("sum", 0.0, 8, 1), Event("gradient", 8e7 / H100.memory_bandwidth, 40_000_000, 1)]


def test_one_kernel_for_the_sums_sends_as_much() -> None:
    scenario = Scenario(SMALL, Nccl(50e9))
    usual, merged = scenario.events(64), replace(scenario, one_kernel=True).events(64)
    assert [(event.kind, event.num_bytes) for event in usual] == [(event.kind, event.num_bytes) for event in merged]
    assert sum(event.launches for event in merged) < sum(event.launches for event in usual)


def test_frozen_batch_norm_communicates_gradients_only() -> None:
    assert {event.kind for event in modelled_events(replace(SMALL, norm="frozen"), H100)} == {"bucket", "wait", "end"}


def test_events_measured_here_are_those_of_the_model() -> None:
    workload = replace(SMALL, ranks=8, norm="frozen")
    measured, model = measured_events(workload, repeats=2), modelled_events(workload, H100)
    assert [(event.kind, event.num_bytes) for event in measured] == [(event.kind, event.num_bytes) for event in model]
    assert all(event.compute_s >= 0 for event in measured)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_change_has_an_effect_where_it_matters(name: str) -> None:
    """On a network so slow, and with launches so slow, that nothing hides; but what is to hide must be noticeable."""
    slow = Nccl(1e9, latency_scale=20.0)
    scenario = Scenario(replace(SMALL, ranks=1), slow, stragglers=Stragglers.normal(0.05))
    if "launches" in name or "sums" in name:
        scenario = replace(scenario, launch_s=1e-3)
    if "weights'" in name:
        scenario = replace(scenario, network=Nccl(50e9), launch_s=0.0)
    changed = CHANGES[name](scenario)
    assert changed.images_per_s(64) != pytest.approx(scenario.images_per_s(64), rel=1e-3)


def test_a_measured_step_scales_all_kernels() -> None:
    scenario = Scenario(replace(SMALL, ranks=1), Nccl(50e9), launch_s=0.0, step_s=0.123)
    assert scenario.step(1).seconds == pytest.approx(0.123)
    assert scenario.step(64).compute_s > 0.123  # batch norm computes more where it communicates


def test_scaling_shows_efficiency_by_ranks_batch_norm_and_bandwidth(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    sizes = ("--backbone", "resnet_tiny", "--crop", 33, "--images", 1, "--ranks", 8, 64)
    done = run_benchmark("scaling", *sizes, "--bandwidth-gbit", 1, 100, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["1 sync", "1 frozen", "8 sync", "8 frozen", "64 sync", "64 frozen"]
    assert rows["1 sync"]["at_1_gbit"] == rows["1 frozen"]["at_100_gbit"] == 1
    assert 0 < rows["64 sync"]["at_100_gbit"] < rows["64 frozen"]["at_100_gbit"] < 1
    assert rows["64 frozen"]["at_1_gbit"] < rows["64 frozen"]["at_100_gbit"]
    assert rows["8 sync"]["batch_norm_ms"] > 0 == rows["8 frozen"]["batch_norm_ms"]


def test_what_if_sorts_changes_by_what_they_give(tmp_path: Path) -> None:
    file = tmp_path / "what_if.json"
    sizes = ("--backbone", "resnet_tiny", "--crop", 33, "--images", 1)
    done = run_benchmark("scaling", "--what-if", *sizes, "--ranks", 64, "--json", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    rows = report["rows"]
    without = next(note for note in report["notes"] if note.startswith("without effect"))
    assert {"as it is", *CHANGES} == {row["what"] for row in rows} | {name for name in CHANGES if name in without}
    assert [row["faster_64"] for row in rows] == sorted((row["faster_64"] for row in rows), reverse=True)
    assert rows[0]["what"] == "frozen batch norm"


@pytest.mark.distributed
def test_check_predicts_real_ranks(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    done = run_benchmark("scaling", "--check", 2, "--crop", 33, "--images", 1, "--rounds", 3, "--json", file)
    assert done.returncode == 0, done.stderr
    sync, frozen = json.loads(file.read_text())["rows"]
    assert (sync["what"], frozen["what"]) == ("2 ranks, crop 33, sync", "2 ranks, crop 33, frozen")
    assert sync["batch_norm_ms"] > 0 == frozen["batch_norm_ms"]
    assert frozen["measured_ms"] > 0 and frozen["measured_over_simulated"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bandwidth-gbit", "0"],
        ["--check", "0"],
        ["--launch-us", "-1"],
        ["--ranks", "0"],
        ["--rounds", "0"],
        ["--crop", "33", "65"],
        ["--rank-times", "missing.jsonl"],
        ["--crop", "66"],
        ["--crop", "1"],
        ["--jitter", "5"],
        ["--jitter", "nan"],
        ["--rounds", "3"],
        ["--what-if", "--rounds", "30"],
        ["--check", "2", "--bandwidth-gbit", "10"],
        ["--check", "2", "--ranks", "8"],
        ["--check", "2", "--nics", "8"],
        ["--check", "2", "--jitter", "0.01"],
        ["--check", "2", "--sums", "ahead"],
        ["--check", "2", "--measured"],
        ["--measured", "--launch-us", "7"],
    ],
)
def test_impossible_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["scaling", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_options_say_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["scaling", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = ("--check; default: 30", "per node; default: 8", "default: 360.0 (Hopper)", f"{H100.kernel_s * 1e6}")
    for default in (*defaults, "per kernel; default: 7.0", "travel; default: ahead", "as a share; default: 0.01"):
        assert default in text
