"""What two nodes download of a set at a slow HTTP server in an epoch, by the loader of `train` and its prefetching.

    python tests/distributed/remote_set.py --shards 200 --per-shard 50

Each node is a process of one rank with a cache of its own: for `full` of the whole set, for `blocks` of the size that
it asks for.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from benchmarks.reads import make_set

from dist_deeplab.config import RunConfig, load_config
from dist_deeplab.data.shards.manifest import Manifest, save_manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.rank_times import RankTimes
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.training.builders import build_checkpoints, split_batch
from dist_deeplab.training.data_builders import build_train_loader, follow_manifest, open_data
from dist_deeplab.training.run import Run
from tests.distributed.forked_ranks import forks
from tests.file_server import serve

NODES, IMAGES = 2, 16  # images of a step, over both nodes


@dataclass(frozen=True)
class Epoch:
    """What a node did in an epoch: the keys that it read, and the shards that it downloaded, with repetitions."""

    keys: list[str]
    downloads: list[str]


def make_remote_set(folder: Path, *, num_shards: int, per_shard: int) -> Manifest:
    """A set of small images that can be trained on; whole steps in an epoch."""
    assert num_shards * per_shard % IMAGES == 0
    manifest = replace(make_set(folder, num_shards=num_shards, per_shard=per_shard), class_pixels=(1, 1))
    save_manifest(manifest)
    return manifest


def read_epoch(manifest: Manifest, folder: Path, shuffle: str, *, latency_s: float, bytes_per_s: int) -> list[Epoch]:
    """Let both nodes read an epoch at the same time, each from a server that serves nobody else, and so counts."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(manifest.path.parent)) for _ in range(NODES)]
        pool = stack.enter_context(ProcessPoolExecutor(NODES, mp_context=forks()))
        for server in servers:
            server.latency_s, server.bytes_per_s = latency_s, bytes_per_s
        running = []
        for node, server in enumerate(servers):
            config = node_config(manifest, server.url, folder / f"{shuffle}_{node}", shuffle)
            running.append(pool.submit(read_share, config, node))
        keys = [reading.result() for reading in running]
        asked = [[path for path, _ in server.requests if path.endswith(".tar")] for server in servers]
    return [Epoch(*of_node) for of_node in zip(keys, asked, strict=True)]


def node_config(manifest: Manifest, url: str, cache_dir: Path, shuffle: str) -> RunConfig:
    """The configuration of an epoch with a cache that holds, for `blocks`, a quarter of the set."""
    share = 1.0 if shuffle == "full" else 0.25
    cache_gib = share * manifest.size_bytes / 2**30
    data = [f"data.train={url}/{manifest.path.name}", f"data.cache_dir={cache_dir}", f"data.cache_gib={cache_gib!r}"]
    data += [f"data.shuffle={shuffle}", "data.window_shards=1", "data.canonical_groups=4", "data.crop_size=33"]
    steps = manifest.num_samples // IMAGES
    return load_config(None, [*data, "data.num_workers=1", f"batch.global_size={IMAGES}", f"max_steps={steps}"])


def read_share(config: RunConfig, node: int) -> list[str]:
    """Read a node's samples of an epoch; their keys."""
    env = DistEnv(node, 0, NODES, "torchrun", "cpu")
    train_set, _ = open_data(config, env)
    config = follow_manifest(config, train_set)
    session = TrainingSession(env, rank_times=RankTimes(env, config.run_dir / "logs"))
    split, checkpoints = split_batch(config, env), build_checkpoints(config, env)
    run = Run(config, env, split, SCRATCH, train_set, None, session, checkpoints)
    return [key for _, batches in build_train_loader(run, start=0) for batch in batches for key in batch.keys]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--per-shard", type=int, default=50)
    parser.add_argument("--latency-ms", type=float, default=20.0, help="until the server answers; default: %(default)s")
    parser.add_argument("--kb-per-s", type=int, default=1000, help="of each answer; default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        manifest = make_remote_set(Path(name) / "set", num_shards=arguments.shards, per_shard=arguments.per_shard)
        for shuffle in ("full", "blocks"):
            nodes = read_epoch(
                manifest,
                Path(name),
                shuffle,
                latency_s=arguments.latency_ms / 1e3,
                bytes_per_s=1000 * arguments.kb_per_s,
            )
            shares = ", ".join(f"{len(node.downloads) / arguments.shards:.3f}" for node in nodes)
            complete = len({key for node in nodes for key in node.keys}) == manifest.num_samples
            print(f"{shuffle}: each node downloaded {shares} of the set; all samples were read: {complete}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
