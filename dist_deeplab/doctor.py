"""Look a cluster over before a long run: the same code everywhere, devices, network, shared disk, data.

    python -m dist_deeplab.doctor [--config FILE] [data.train=data/voc/train.json ...]
    torchrun --nproc_per_node 8 -m dist_deeplab.doctor data.train=data/voc/train.json
    MODULE=dist_deeplab.doctor NNODES=2 ... ./launch/multi_node.sh data.train=data/voc/train.json
    sbatch --nodes 4 --ntasks-per-node 8 ... --wrap "srun python -m dist_deeplab.doctor data.train=..."

Takes the arguments of dist_deeplab.train and writes only to a folder of its own in output_dir, which it removes again.
Exit codes: 0 all is well (there may be warnings), 1 a check failed, 2 wrong arguments, or ranks that did not come.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from dist_deeplab import config as configuration
from dist_deeplab.command_line import command_name
from dist_deeplab.data.shards.manifest import load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.distributed import diagnostics as checks
from dist_deeplab.distributed.diagnostics import Finding
from dist_deeplab.distributed.launcher import hard_exit, run_command
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import session
from dist_deeplab.logs import format_count

_SAMPLES = 8  # read by each rank, spread over the set


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda env: command(arguments, env))


def command(arguments: argparse.Namespace, env: DistEnv) -> int:
    """Make all checks, print their table and return the exit code."""
    config = configuration.load_config(arguments.config, arguments.overrides)
    limits = config.distributed
    with session(env, startup_timeout_s=limits.startup_timeout_s, hang_timeout_s=limits.hang_timeout_s):
        findings = [
            *checks.check_software(env),
            *checks.check_devices(env),
            *checks.check_network(env),
            *checks.check_disk(env, config.run_dir.parent),
            *check_shards(config),
        ]
    env.on_main(sys.stdout.write, checks.render(findings))
    return 1 if any(finding.verdict == "FAILED" for finding in findings) else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("doctor"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="the YAML file that training will get")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="the overrides that training will get"
    )
    return parser.parse_intermixed_args(argv)


def check_shards(config: configuration.RunConfig) -> list[Finding]:
    """Read some samples of each configured set on every rank; every rank must call it."""
    given = {"data.train": config.data.train, "data.val": config.data.val}
    sets = {key: location.real for key, location in given.items() if location}
    return [checks.on_all_ranks(key, functools.partial(read_some, path)) for key, path in sets.items()]


def read_some(path: str) -> str:
    """Return what a manifest holds, after reading samples all over it.

    Raises:
        UserError: it, its index or a shard is missing or damaged.
    """
    manifest = load_manifest(path)
    reader = ShardReader(manifest)
    for index in range(0, manifest.num_samples, max(1, manifest.num_samples // _SAMPLES)):
        reader.read(index)
    samples, shards = format_count(manifest.num_samples, "sample"), format_count(len(manifest.shards), "shard")
    return f"{samples} in {shards}, keys {manifest.keys_sha256[:12]}"


if __name__ == "__main__":
    hard_exit(main())
