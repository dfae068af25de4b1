"""Check a cluster before a long run: code, devices, network, disk, data, the kernels of a training step, its speed.

    python -m dist_deeplab.doctor [--config FILE] [--json FILE] [data.train=data/voc/train.json ...]
    torchrun --nproc_per_node 8 -m dist_deeplab.doctor data.train=data/voc/train.json
    MODULE=dist_deeplab.doctor NNODES=2 ... ./launch/multi_node.sh data.train=data/voc/train.json
    sbatch --nodes 4 --ntasks-per-node 8 ... --wrap "srun python -m dist_deeplab.doctor data.train=..."

Takes the arguments of dist_deeplab.train and writes only to a folder of its own in output_dir, which it removes again.
The kernels are compared with float64 on the CPU in each arithmetic that the device has. With data.train it says what
limits the configured run, how long that would take, and what to set. Under two minutes per node.
Exit codes: 0 all is well (there may be warnings), 1 a check failed, 2 wrong arguments, or ranks that did not join.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dist_deeplab import config as configuration
from dist_deeplab.command_line import command_name
from dist_deeplab.config import RunConfig
from dist_deeplab.config.section import Location
from dist_deeplab.data.shards.cache import build_cache
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.distributed import diagnostics
from dist_deeplab.distributed.diagnostics import Finding
from dist_deeplab.distributed.from_main import wait_for_main
from dist_deeplab.distributed.launcher import hard_exit, run_command
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all, ranks_on_host
from dist_deeplab.distributed.session import Session, session
from dist_deeplab.errors import UserError
from dist_deeplab.files import prepare_file, replace_text
from dist_deeplab.logs import format_count
from dist_deeplab.training.builders import split_batch
from dist_deeplab.training.data_builders import follow_manifest, open_data
from dist_deeplab.training.kernel_checks import checks, run_check
from dist_deeplab.training.rates import Forecast, Rates, forecast, measure_arithmetic, measure_copy, measure_loader

_BOTH_SETS = "data of the run"
_READING_S = 20.0  # for all shards; what is left out is counted


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda env: command(arguments, env))


def command(arguments: argparse.Namespace, env: DistEnv) -> int:
    """Make all checks, print their table and return the exit code."""
    config = configuration.load_config(arguments.config, arguments.overrides)
    if arguments.json:
        prepare_file(arguments.json, remedy="choose another --json")
    limits = config.distributed
    env = replace(env, device_kind=config.device)
    with session(env, startup_timeout_s=limits.startup_timeout_s, hang_timeout_s=limits.hang_timeout_s) as ranks:
        findings, rates, expected = examine(config, ranks)
        wait_for_main(env, lambda: report(findings, rates, expected, arguments.json))
    return 1 if any(finding.status == "FAILED" for finding in findings) else 0


def report(findings: Sequence[Finding], rates: Rates, expected: Forecast | None, file: Path | None) -> None:
    """Print the table, and write the same to a JSON file where one is wanted."""
    sys.stdout.write(diagnostics.render(findings))
    if file:
        content = {
            "findings": [asdict(finding) for finding in findings],
            "rates": asdict(rates),
            "forecast": asdict(expected) if expected else None,
        }
        replace_text(file, json.dumps(content, indent=1) + "\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("doctor"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="the YAML file that training will get")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write findings and rates to this file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="the overrides that training will get"
    )
    return parser.parse_intermixed_args(argv)


def examine(config: RunConfig, ranks: Session) -> tuple[list[Finding], Rates, Forecast | None]:
    """All findings, the slowest rank's rates, and what they say about the run, if it has data; every rank calls it."""
    env = ranks.env
    network, all_reduce_rate = diagnostics.check_network(env)
    findings = [
        *diagnostics.check_software(env),
        *diagnostics.check_devices(env),
        diagnostics.check_open_files(env),
        network,
        *diagnostics.check_disk(env, config.run_dir.parent),
        *check_shards(config, env),
        *check_kernels(ranks),
    ]
    ranks.progress.begin("measuring speed")
    if any(finding.what == _BOTH_SETS and finding.status == "ok" for finding in findings):
        train_set = open_set(config.data.train, config)
        config = follow_manifest(config, train_set)
    else:
        train_set = None
    rates = replace(measure(config, env, train_set), all_reduce_bytes_per_s=all_reduce_rate)
    findings += [Finding(what, "ok", text) for what, text in rates.describe().items()]
    expected = None
    if rates.loader_images_per_s:
        expected = forecast(config, env, split_batch(config, env), rates)
        findings.append(Finding("the configured run", "ok", str(expected)))
    return findings, rates, expected


def check_shards(config: RunConfig, env: DistEnv) -> list[Finding]:
    """Read from every shard of each configured set on each node, then ask what training asks of them together.

    Every rank must call it.
    """
    sets = {key: place for key, place in (("data.train", config.data.train), ("data.val", config.data.val)) if place}
    found = []
    for key, place in sets.items():
        finding = diagnostics.on_all_ranks(key, functools.partial(describe_set, place, config))
        if finding.status == "ok":
            problems = gather_to_all(_problem_of(open_set(place, config), env))
            named = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
            finding = Finding(key, "FAILED", "; ".join(named)) if named else finding
        found.append(finding)
    if config.data.train and all(finding.status == "ok" for finding in found):
        found.append(diagnostics.on_all_ranks(_BOTH_SETS, functools.partial(describe_data, config, env)))
    return found


def describe_data(config: RunConfig, env: DistEnv) -> str:
    """That training would take the data, by its own checks.

    Raises:
        UserError: training would refuse the data.
    """
    train_set, _ = open_data(config, env)
    data = follow_manifest(config, train_set).data
    return f"{format_count(data.num_classes, 'class', 'classes')}, void is {data.ignore_label}; training takes it"


def open_set(place: Location, config: RunConfig) -> Manifest:
    """The manifest at a configured place, a URL through the configured cache."""
    return load_manifest(place.real, cache=build_cache(config.data.cache_dir, config.data.cache_gib))


def describe_set(place: Location, config: RunConfig) -> str:
    """What a manifest holds, the same on all ranks."""
    manifest = open_set(place, config)
    size = f"{format_count(manifest.num_samples, 'sample')} in {format_count(len(manifest.shards), 'shard')}"
    return f"{size}, keys {manifest.keys_sha256[:12]}"


def _problem_of(manifest: Manifest, env: DistEnv) -> str:
    """What is wrong with this rank's share of its node's shards, by a sample of each; nothing where all is well."""
    try:
        read_shards(manifest, share=env.local_rank, shares=ranks_on_host())
        return ""
    except (OSError, RuntimeError, UserError) as error:
        return str(error)


def read_shards(manifest: Manifest, *, share: int, shares: int) -> int:
    """Read one sample of every `shares`-th shard from `share` on, for at most 20 s; the number of shards read.

    Raises:
        UserError: a shard is missing or damaged.
    """
    reader = ShardReader(manifest)
    started, first, num_read = time.monotonic(), 0, 0
    for number, shard in enumerate(manifest.shards):
        if number % shares == share % shares and time.monotonic() - started < _READING_S:
            reader.read(first + (7919 * number) % shard.num_samples)  # not always the first one
            num_read += 1
        first += shard.num_samples
    return num_read


def check_kernels(ranks: Session) -> list[Finding]:
    """Compare every part of a training step with float64 on the CPU, in each arithmetic; every rank must call it."""
    found = []
    for precision in precisions(ranks.env.device):
        for check in checks():
            ranks.progress.begin(f"checking {check.name} in {precision}")
            try:
                own: Any = run_check(check, ranks.env, precision)
            except RuntimeError as error:
                own = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            found.append(_compare(f"{check.name} ({precision})", gather_to_all(own), check.tolerances[precision]))
    return found


def _compare(name: str, errors: list[Any], tolerance: float) -> Finding:
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if isinstance(error, str)]
    if failed:
        return Finding(name, "FAILED", "; ".join(failed))
    worst = max(range(len(errors)), key=lambda rank: errors[rank])
    text = f"relative error {errors[worst]:.1e}, allowed {tolerance:.0e}"
    if errors[worst] <= tolerance:
        return Finding(name, "ok", text)
    return Finding(name, "FAILED", f"{text}, on rank {worst}: this kernel computes wrongly here")


def precisions(device: torch.device) -> list[str]:
    """Values of `precision.dtype` that the device computes in."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    return ["fp32", "tf32", "fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]


def measure(config: RunConfig, env: DistEnv, train_set: Manifest | None) -> Rates:
    """The slowest rank's rates; the loader's where there is a set that training takes."""
    device = env.device
    matmul, convolution = measure_arithmetic(config.precision.dtype, device)
    loader = None
    if train_set:
        loader = measure_loader(config, env, split_batch(config, env), train_set)
    own = [matmul, convolution, measure_copy(device), loader or 0.0]
    slowest = [min(values) for values in zip(*gather_to_all(own))]
    return Rates(slowest[0], slowest[1], slowest[2], slowest[3] or None)


if __name__ == "__main__":
    hard_exit(main())
