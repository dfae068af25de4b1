"""Weak scaling of a step to n GPUs, simulated: from its kernels and collectives, a host's launches and stragglers.

    python tools/benchmark.py scaling                                  # efficiency at 8 to 1,024 GPUs
    python tools/benchmark.py scaling --what-if                        # which change would help most
    python tools/benchmark.py scaling --check 2 4 --crop 65 161        # predictions beside real gloo ranks

Kernels are those that the real code launches, timed by a model of the GPU (`--measured`: by this machine's device).
Collectives follow NCCL's own cost model. All constants are options. --check measures the parts of a step on gloo ranks
of this machine, predicts whole steps from them, and measures these.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.events import Norm, Workload
from benchmarks.harness import Report, Row
from benchmarks.modelled_gpu import H100, Gpu
from benchmarks.network import Nccl
from benchmarks.scaling_check import ROUNDS, check_report
from benchmarks.scenario import CHANGES, Scenario
from benchmarks.stragglers import Stragglers
from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count

SUMMARY = "what a step would take on n GPUs, simulated and checked"
_MODELLED = {  # what --measured takes from this machine
    "matmul_tflops": H100.matmul_flops / 1e12,
    "memory_tb": H100.memory_bandwidth / 1e12,
    "kernel_us": H100.kernel_s * 1e6,
    "launch_us": 7.0,
}
# What --check takes from this machine. The parser's defaults are None, so that what was given is known.
_SIMULATED: dict[str, Any] = {
    "ranks": None,
    "bandwidth_gbit": None,
    "nics": 8,
    "gpus": 8,
    "nvlink_gb": 360.0,
    "latency_scale": 1.0,
    **_MODELLED,
    "step_ms": 0.0,
    "measured": False,
    "sums": "ahead",
    "jitter": 0.01,
    "rank_times": None,
}
_UNCHANGED, _NO_GAIN = "as it is", 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backbone", help="default: resnet101; of --check: resnet_tiny")
    add("--crop", type=int, nargs="+", help="pixels, 8k+1; --check takes several; default: 321; of --check: 65 161")
    add("--images", type=int, help="images per rank; default: 10; of --check: 4")
    add("--ranks", type=int, nargs="+", help="numbers of GPUs; default: 8 16 64 128 512 1024; of --what-if: 64 1024")
    kind = parser.add_mutually_exclusive_group()
    add = kind.add_argument
    add("--what-if", nargs="?", const="sync", choices=["sync", "frozen"], help="list changes to this batch norm's run")
    add("--check", type=int, nargs="+", default=[], metavar="RANKS", help="run on real gloo ranks instead, e.g. 2 4")
    parser.add_argument("--rounds", type=int, help=f"steps of each --check; default: {ROUNDS}")
    network = parser.add_argument_group(
        "network", "NCCL's latencies per hop are in benchmarks/network.py. Not for --check."
    )
    default = {name: f"default: {value}" for name, value in _SIMULATED.items()}
    add = network.add_argument
    add("--bandwidth-gbit", type=float, nargs="+", help="of a network card; default: 100 200 400; of --what-if: 400")
    add("--nics", type=int, help=f"network cards per node; {default['nics']}")
    add("--gpus", type=int, help=f"per node, with NVLink; {default['gpus']}")
    add("--nvlink-gb", type=float, help=f"GB/s that NCCL gets from NVLink; {default['nvlink_gb']} (Hopper)")
    add("--latency-scale", type=float, help=f"of all hops; {default['latency_scale']}")
    gpu = parser.add_argument_group("GPU and host", "Not for --check; * not for --measured.")
    add = gpu.add_argument
    add("--matmul-tflops", type=float, help=f"* reached; {default['matmul_tflops']} (H100)")
    add("--memory-tb", type=float, help=f"* TB/s reached; {default['memory_tb']}")
    add("--kernel-us", type=float, help=f"* shortest kernel; {default['kernel_us']}")
    add("--launch-us", type=float, help=f"* host's time per kernel; {default['launch_us']}")
    add("--step-ms", type=float, help="measured on one GPU alone: kernels are scaled to it")
    add("--measured", action="store_true", default=None, help="measure compute on this device instead (no launches)")
    add("--sums", choices=["ahead", "waited"], help=f"how the small sums travel; {default['sums']}")
    add = gpu.add_mutually_exclusive_group().add_argument
    add("--jitter", type=float, help=f"deviation of a rank's step time, as a share; {default['jitter']}")
    add("--rank-times", type=Path, metavar="FILE", help="a run's logs/rank_times.jsonl, instead of --jitter")


def run(arguments: argparse.Namespace) -> Report:
    """The table of efficiencies, of changes, or of the check.

    Raises:
        UserError: impossible numbers, options that would be ignored, a file of rank times that can't be read, or ranks
            that failed.
    """
    require_possible(arguments)
    require_used(arguments)
    if arguments.check:
        return check_report(
            arguments.backbone or "resnet_tiny",
            arguments.crop or [65, 161],
            images=arguments.images or 4,
            rank_counts=arguments.check,
            rounds=arguments.rounds or ROUNDS,
        )
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    arguments = argparse.Namespace(**{**vars(arguments), **_SIMULATED, **given})
    scenario = build_scenario(arguments)
    return what_if_report(scenario, arguments) if arguments.what_if else efficiency_report(scenario, arguments)


def require_possible(arguments: argparse.Namespace) -> None:
    """Check the numbers that were given.

    Raises:
        UserError: one can't be.
    """
    of_network = ("bandwidth_gbit", "nics", "gpus", "nvlink_gb")
    positive = (*of_network, "matmul_tflops", "memory_tb", "images", "ranks", "check", "rounds", "crop")
    for name in (*positive, "latency_scale", "kernel_us", "launch_us", "step_ms", "jitter"):
        given = getattr(arguments, name)
        for number in given if isinstance(given, list | tuple) else [] if given is None else [given]:
            problem = ""
            if not number >= 0 or (number == 0 and name in positive):  # NaN is refused too
                problem = "must be above 0" if name in positive else "must be 0 or more"
            elif name == "crop" and (number % 8 != 1 or number < 9):
                problem = "must be 8k+1, e.g. 65 or 321"
            elif name == "jitter" and number > 1:
                problem = "is a share of a step's time, so at most 1"
            if problem:
                raise UserError(f"{_option(name)} {number:g}: {problem}")


def require_used(arguments: argparse.Namespace) -> None:
    """Check that every option that was given has an effect beside the others.

    Raises:
        UserError: one would be ignored.
    """

    def first_of(names: Iterable[str]) -> str:
        return next((_option(name) for name in names if getattr(arguments, name) is not None), "")

    if arguments.check:
        if unused := first_of(_SIMULATED):
            raise UserError(
                f"{unused} is not for --check, which takes real ranks of this machine; leave one of them out"
            )
        return
    if arguments.rounds is not None:
        raise UserError("--rounds is for --check; leave it out or add --check")
    if len(arguments.crop or []) > 1:
        raise UserError("several values of --crop are for --check; give one")
    if arguments.measured and (unused := first_of(_MODELLED)):
        raise UserError(f"{unused} is not for --measured, which measures this device; leave one of them out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def build_scenario(arguments: argparse.Namespace) -> Scenario:
    """The cluster and the workload that the arguments describe, with the last of the bandwidths."""
    crop = arguments.crop[0] if arguments.crop else 321
    norm: Norm = arguments.what_if or "sync"
    workload = Workload(arguments.backbone or "resnet101", crop, arguments.images or 10, norm)
    network = Nccl(
        bandwidths(arguments)[-1] * arguments.nics * 1e9 / 8,
        arguments.gpus,
        arguments.nvlink_gb * 1e9,
        arguments.latency_scale,
    )
    gpu = Gpu(arguments.matmul_tflops * 1e12, arguments.memory_tb * 1e12, arguments.kernel_us * 1e-6)
    path = arguments.rank_times
    return Scenario(
        workload,
        network,
        None if arguments.measured else gpu,
        0.0 if arguments.measured else arguments.launch_us * 1e-6,
        Stragglers.from_rank_times(path) if path else Stragglers.normal(arguments.jitter),
        arguments.step_ms * 1e-3,
        sums_ahead=arguments.sums == "ahead",
    )


def bandwidths(arguments: argparse.Namespace) -> list[float]:
    """Gbit/s of a network card, one for each column."""
    return arguments.bandwidth_gbit or ([400.0] if arguments.what_if else [100.0, 200.0, 400.0])


def efficiency_report(scenario: Scenario, arguments: argparse.Namespace) -> Report:
    """Efficiency by number of GPUs, batch norm and bandwidth, and the parts of a step at the last bandwidth."""
    rows: list[Row] = []
    for ranks in [1, *(n for n in arguments.ranks or [8, 16, 64, 128, 512, 1024] if n > 1)]:
        for norm in ("sync", "frozen"):
            base = replace(scenario, workload=replace(scenario.workload, norm=norm))
            efficiencies: Row = {}
            for gbit in bandwidths(arguments):
                network = replace(base.network, node_bandwidth=gbit * arguments.nics * 1e9 / 8)
                efficiencies[f"at_{gbit:g}_gbit"] = replace(base, network=network).efficiency(ranks)
            launches = sum(event.launches for event in base.events(ranks))
            rows.append(
                {"what": f"{ranks:,} {norm}", **efficiencies, **parts(base, ranks), "kernels": launches or None}
            )
    return Report(title(scenario, "weak scaling"), rows, notes(scenario, arguments))


def parts(scenario: Scenario, ranks: int) -> Row:
    """Milliseconds of a step and of its parts."""
    step = scenario.step(ranks)
    names = ("compute", "straggling", "sharing", "host", "batch_norm", "gradients")
    values = {"step": step.seconds, **{name: getattr(step, f"{name}_s") for name in names}}
    return {f"{name}_ms": round(1e3 * seconds, 6) + 0.0 for name, seconds in values.items()}


def what_if_report(scenario: Scenario, arguments: argparse.Namespace) -> Report:
    """One row for each change that matters, the best at the last number of GPUs first."""
    sizes = arguments.ranks or [64, 1024]
    usual = [scenario.images_per_s(ranks) for ranks in sizes]
    variants = {_UNCHANGED: scenario, **{name: change(scenario) for name, change in CHANGES.items()}}
    gains = {name: [s.images_per_s(n) / now for n, now in zip(sizes, usual)] for name, s in variants.items()}
    without = [n for n, gain in gains.items() if n != _UNCHANGED and all(abs(x - 1) < _NO_GAIN for x in gain)]
    rows: list[Row] = [
        {
            "what": name,
            **{f"efficiency_{ranks}": variants[name].efficiency(ranks) for ranks in sizes},
            **{f"faster_{ranks}": gain for ranks, gain in zip(sizes, gains[name])},
        }
        for name in sorted(gains, key=lambda name: -gains[name][-1])
        if name not in without
    ]
    explained = [
        "faster: images per second, as a multiple of those without the change; efficiency: one GPU has the change too",
        f"without effect: {'; '.join(without) or 'none'}",
    ]
    heading = f"changes to {scenario.workload.norm} batch norm"
    return Report(title(scenario, heading), rows, [*explained, *notes(scenario, arguments)])


def title(scenario: Scenario, what: str) -> str:
    """The report's title."""
    workload = scenario.workload
    return f"{what}: {workload.backbone}, {workload.images} x {workload.crop} x {workload.crop} per GPU"


def notes(scenario: Scenario, arguments: argparse.Namespace) -> list[str]:
    """What the figures rest on."""
    network = scenario.network
    compute = (
        f"compute modelled: {arguments.matmul_tflops:.4g} TFLOP/s, {arguments.memory_tb:.3g} TB/s, kernels of "
        f"{arguments.kernel_us:g} us at least, each launched in {arguments.launch_us:g} us"
        if scenario.gpu
        else "compute measured on this device; launches not counted"
    )
    scaled = f", scaled to {arguments.step_ms:g} ms for one GPU alone" if arguments.step_ms else ""
    draws = f"drawn from {arguments.rank_times}" if arguments.rank_times else f"{arguments.jitter:g} (normal; assumed)"
    return [
        compute + scaled,
        f"network: {format_count(arguments.nics, 'card')} per node of {format_count(network.gpus, 'GPU')}; "
        "parts are those at the last bandwidth; "
        f"NVLink {arguments.nvlink_gb:g} GB/s; NCCL's latencies x {arguments.latency_scale:g}",
        f"deviation of a rank's step time: {draws}; all wait for the slowest",
        f"small sums: {arguments.sums}",
    ]
