"""The harness measures what it says, and every sub-command runs on a CPU and writes all that its table shows."""

import argparse
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import benchmark
import pytest
import torch
from benchmarks.batch_norm import layer_shapes
from benchmarks.competitors import Variant, expand, variants
from benchmarks.harness import Row, Timing, interleave, ratio_column
from benchmarks.peers import plain_network

from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import norm_factory
from dist_deeplab.model.deeplabv2 import DeepLabV2

ROOT = Path(__file__).resolve().parents[3]


def test_competitors_take_turns_and_each_starts_equally_often() -> None:
    calls: list[str] = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=0)
    assert calls == list("abcbcacab")
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_warmup_rounds_are_run_but_not_counted() -> None:
    calls: list[int] = []
    timings = interleave({"a": lambda: calls.append(0)}, rounds=2, warmup=3)
    assert (len(calls), len(timings["a"].seconds)) == (5, 2)


def test_the_device_is_waited_for_before_and_after_each_run() -> None:
    events: list[str] = []
    interleave({"a": lambda: events.append("run")}, rounds=1, warmup=1, synchronize=lambda: events.append("wait"))
    assert events == ["wait", "run", "wait"] * 2


def test_spread_is_half_the_quartile_range_over_the_median() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.5 - 1.5) / 2 / 3.0)


def test_ratios_are_to_the_named_row() -> None:
    rows: list[Row] = [{"what": "peer", "rate": 2.0}, {"what": "ours", "rate": 5.0}, {"what": "none", "rate": None}]
    ratio_column(rows, of="rate", to="peer", name="x")
    assert [row["x"] for row in rows] == [1.0, 2.5, None]


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The tool in this process: an import of torch takes longer than most of these measurements."""
    command = ["tools/benchmark.py", *map(str, arguments)]
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", command),
    ):
        code = benchmark.main(command[1:])
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def test_step_measures_both_baselines_and_ours(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    sizes = ("--crop", 33, "--images", 2, "--accumulation", 2, "--rounds", 2)
    done = run_benchmark("step", *sizes, "--ours", "fp32", "fp32+nchw+forloop+recompute", "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == ["eager", "amp", "ours_fp32", "ours_fp32+nchw+forloop+recompute"]
    assert all(row["images_per_s"] > 0 and row["of_peak"] > 0 for row in rows.values())
    assert rows["ours_fp32"]["backward_ms"] > 0
    assert rows["ours_fp32"]["data_ms"] > 0
    assert rows["ours_fp32"]["x_eager"] == pytest.approx(
        rows["ours_fp32"]["images_per_s"] / rows["eager"]["images_per_s"]
    )
    assert found["machine"]["torch"] and "benchmark.py step --crop 33" in found["machine"]["command"]


@pytest.mark.parametrize("batch_norm", ["local", "frozen"])
def test_the_peers_network_computes_what_ours_does(batch_norm: str) -> None:
    torch.manual_seed(0)
    net = DeepLabV2("resnet_tiny", 3, norm=norm_factory(batch_norm)).double().train()
    plain = plain_network(net, "resnet_tiny").double().train()
    image = torch.randn(2, 3, 33, 41, dtype=torch.float64)
    ours, theirs = net(image), plain(image)
    torch.testing.assert_close(theirs, ours)
    slope = torch.randn_like(ours)
    gradients = [
        torch.autograd.grad(logits, [p for p in which.parameters() if p.requires_grad], slope)
        for which, logits in ((net, ours), (plain, theirs))
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_each_choice_is_a_row_together_with_the_others_and_by_itself() -> None:
    each = {one.name for one in expand(["each"], on_gpu=True, ranks=1)}
    assert {"ours_bf16", "ours_bf16+nchw", "ours_bf16+nobench", "ours_bf16+noupload", "ours_bf16+forloop"} <= each
    assert {"ours_bf16+compile", "ours_bf16+recompute", "ours_fp32", "ours_fp16"} <= each
    alone = {one.name for one in expand(["alone"], on_gpu=True, ranks=1)}
    assert {"ours_fp32+nchw+nobench+forloop+noupload", "ours_fp32+nobench+forloop+noupload"} <= alone  # channels-last
    assert "ours_bf16+nchw+nobench+forloop+noupload" in alone
    on_ranks = {one.name for one in expand(["each", Variant("fp32")], on_gpu=False, ranks=2)}
    assert {"ours_fp32", "ours_fp32+compress", "ours_fp32+static"} <= on_ranks
    assert not any("nobench" in name or "bf16" in name for name in on_ranks)


@pytest.mark.parametrize(("option", "where"), [("noupload", "a GPU"), ("static", "several ranks")])
def test_an_option_that_does_nothing_here_is_refused(option: str, where: str) -> None:
    with pytest.raises(UserError, match=f"{option} does nothing here; it needs {where}"):
        expand([Variant("fp32", (option,))], on_gpu=False, ranks=1)


@pytest.mark.parametrize("text", ["fp8", "bf16+fast", "fp32+compile+recompute", "fp32+foreach+forloop"])
def test_a_variant_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        variants(text)


def test_a_share_that_does_not_divide_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["step", "--images", "3", "--accumulation", "2"]) == 2
    assert "--images 3 is not a multiple of --accumulation 2" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["step", "--json", str(tmp_path)]) == 2
    assert f"cannot write the file {tmp_path}: it is a folder; choose another --json" in capsys.readouterr().err


def test_batch_norm_takes_the_synchronised_path_alone_too(tmp_path: Path) -> None:
    file = tmp_path / "bn.json"
    done = run_benchmark("batch_norm", "--crop", 33, "--images", 1, "--rounds", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["ours"]["ms"] > 0
    assert rows["BatchNorm2d"]["x_BatchNorm2d"] == 1


def test_batch_norm_shapes_are_those_in_the_network() -> None:
    shapes = layer_shapes("resnet101", 2, 321)
    assert len(shapes) == 104
    assert shapes[0] == (2, 64, 161, 161)
    assert shapes[-1] == (2, 2048, 41, 41)


def test_evaluation_is_compared_with_the_plain_loop(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.json"
    done = run_benchmark("evaluate", "--images", 5, "--shrink", 8, "--rounds", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["evaluation"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["loop", "ours", "ours_3_scales", "ours_3_scales_flip"]
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["loop"]["x_loop"] == 1


def test_the_crf_is_measured_directly_and_through_its_pool(tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf", reason="pydensecrf2 (the extra crf) is not installed")
    file = tmp_path / "crf.json"
    sizes = ("--size", 20, 30, "--images", 1, "--processes", 1, "--rounds", 1)
    done = run_benchmark("crf", *sizes, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["crf"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"direct", "pool_1"}
    assert all(row["images_per_s_and_core"] > 0 for row in rows.values())


def test_loader_counts_what_each_order_asks_of_the_storage(tmp_path: Path) -> None:
    file = tmp_path / "reads.json"
    sizes = ("--shards", 100, "--per-shard", 40, "--batch", 16, "--nodes", 2, "--workers", 1, "--latency-ms", 0)
    done = run_benchmark("loader", "--order", "full", "blocks", *sizes, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {(row["order"], row["store"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 6
    assert rows["full", "folder"]["opens_per_sample"] > 0.2, "64 of 100 shards are open"
    assert rows["blocks", "folder"]["opens_per_sample"] < 1.3 / 40, "each shard about once"
    for node in range(2):
        assert rows["full", f"http, node {node}"]["downloads"] == 1
        assert 0.45 <= rows["blocks", f"http, node {node}"]["downloads"] <= 1.1 / 2


def test_loader_measures_ours_beside_all_others_on_the_same_images(shard_set: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "loader.json"
    sizes = ("--crop", 33, "--images", 8, "--batch", 4, "--rounds", 2)
    done = run_benchmark("loader", "--data", shard_set.path, *sizes, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    others = ["folder_pillow", "folder_opencv", "webdataset", "webdataset_ours"]
    assert list(rows) == [*others, "ours", "ours_photometric", "decode"]
    assert all(row["samples_per_core_s"] > 0 for row in rows.values())
    assert all(rows[name]["first_batch_s"] > 0 and rows[name]["worker_mib"] > 0 for name in rows if name != "decode")
    assert rows["decode"]["x_decode"] == 1


def test_all_benchmarks_become_one_report_and_those_without_time_are_named(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "all", "--out", tmp_path / "report", "--minutes", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report" / "report.md").read_text()
    for name in ("batch_norm", "step", "scaling", "scale", "evaluate", "loader", "crf"):
        assert f"## {name}\n" in report
    assert "not finished in" in report or "no time was left" in report
    assert run_benchmark("all", "--out", tmp_path, "--minutes", 0).returncode == 2


@pytest.mark.quick("P10")
def test_scale_counts_what_travels_and_it_stays_flat_beyond_a_node(tmp_path: Path) -> None:
    file = tmp_path / "scale.json"
    done = run_benchmark("scale", "--crop", 33, "--rounds", 1, "--ranks", 64, 1024, "--json", file)
    assert done.returncode == 0, done.stderr
    some, many = json.loads(file.read_text())["rows"]
    assert some["collectives"] == many["collectives"] > 0
    assert many["received_kb"] == pytest.approx(some["received_kb"], rel=0.02)
    assert some["start_s"] > 0
    assert many["start_mib"] < 1.2 * some["start_mib"]


def test_scale_makes_sets_of_so_many_samples_and_a_checkpoint_keeps_little_of_them(tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    done = run_benchmark("scale", "--samples", 2e6, "--folder", tmp_path, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["samples"], row["shuffle"], row["checkpoint_mib"]) for row in rows] == [
        (2_000_000, "full", 8),
        (2_000_000, "blocks", 8),
    ]
    assert all(row[name] > 0 for row in rows for name in ("first_batch_s", "rank_mib", "worker_mib"))
    assert list(tmp_path.iterdir()) == [file]
    assert run_benchmark("scale", "--samples", 1234).returncode == 2
