"""What an epoch of each order asks of the storage: opens, reads and bytes per sample, and downloads of each node.

A drawn set of small images, from a folder and from an HTTP server that takes --latency-ms for each answer. Each node
has one rank with --workers loader workers, each with its own open shards, and a cache of its own: for `full` of the
whole set, for `blocks` of what `BlockShuffle.cached_shards` asks for. Nothing is decoded.
"""

import argparse
import contextlib
import http.server
import io
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from benchmarks.harness import Report, Row
from dist_deeplab.data.blocks import BlockShuffle
from dist_deeplab.data.order import BatchSplit, FullShuffle, SampleOrder
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.writer import Draft, write_manifest
from dist_deeplab.data.shards.cache import ShardCache
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.data.shards.presence import SetContents
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.logs import format_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=200, help="with --order: shards; default: %(default)s")
    parser.add_argument("--per-shard", type=int, default=1000, help="with --order: samples of each; %(default)s")
    parser.add_argument("--nodes", type=int, default=2, help="with --order: nodes of one rank; default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="with --order: per rank; default: %(default)s")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="with --order: of the server; %(default)s")


@dataclass
class Counts:
    """What the readers of one node did."""

    samples: int = 0
    opens: int = 0
    reads: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class CountingReader(ShardReader):
    """A reader that counts."""

    def __init__(self, manifest: Manifest, counts: Counts, *, max_open: int) -> None:
        super().__init__(manifest, max_open=max_open)
        self.counts = counts

    def _pread(self, shard: int, offset: int, size: int, index: int) -> bytes:
        self.counts.opens += shard not in self._files
        self.counts.reads += 1
        self.counts.num_bytes += size
        return super()._pread(shard, offset, size, index)


@dataclass
class Server:
    """Where the store is and which tars were asked for."""

    url: str = ""
    asked: list[str] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> Report:
    """Count for each order of --order."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = make_set(folder / "set", num_shards=arguments.shards, per_shard=arguments.per_shard)
        with slow_store(folder / "set", latency_s=arguments.latency_ms / 1000) as server:
            for order_name in arguments.order:
                split = BatchSplit.derive(
                    global_size=arguments.batch,
                    micro_size=None,
                    world_size=arguments.nodes,
                    contiguous=order_name == "blocks",
                )
                order, cached_bytes = build_order(order_name, local, split, arguments.nodes)
                row: Row = {"order": order_name, "store": "folder"}
                rows.append(row | row_of(read_epoch(local, order, split, 0, arguments)))
                for node in range(arguments.nodes):
                    cache = ShardCache(folder / f"{order_name}-{node}", cached_bytes)
                    manifest = load_manifest(f"{server.url}/train.json", cache=cache)
                    server.asked.clear()
                    counts = read_epoch(manifest, order, split, node, arguments)
                    row = {"order": order_name, "store": f"http, node {node}"}
                    rows.append(row | row_of(counts, downloads=len(server.asked) / arguments.shards))
    notes = [
        f"{format_count(arguments.shards, 'shard')} of {format_count(arguments.per_shard, 'sample')}, "
        f"{format_count(arguments.nodes, 'node')}, steps of {arguments.batch}; a server that "
        f"takes {arguments.latency_ms:g} ms for each answer",
        "downloads: shards that a node fetched in an epoch, as a share of the set; nothing is fetched ahead here",
    ]
    return Report("what an order asks of the storage", rows, notes)


def build_order(name: str, manifest: Manifest, split: BatchSplit, nodes: int) -> tuple[SampleOrder, int]:
    """The order, with the defaults of the configuration, and bytes of cache that it needs on a node."""
    if name == "full":
        return FullShuffle(manifest.num_samples, 0), manifest.size_bytes
    sizes = [shard.num_samples for shard in manifest.shards]
    blocks = BlockShuffle(sizes, seed=0, window_shards=4, groups=16, global_size=split.global_size)
    return blocks, blocks.cached_shards(nodes) * max(shard.size_bytes for shard in manifest.shards)


def read_epoch(
    manifest: Manifest, order: SampleOrder, split: BatchSplit, rank: int, arguments: argparse.Namespace
) -> Counts:
    """Read a rank's samples of an epoch; its workers take its batches in turns, as a DataLoader's do."""
    counts = Counts()
    workers = [
        CountingReader(manifest, counts, max_open=order.open_shards(split, rank)) for _ in range(arguments.workers)
    ]
    started = time.perf_counter()
    for step in range(manifest.num_samples // split.global_size):
        for positions in split.positions(step, rank):
            for position in positions:
                workers[step % len(workers)].read(order.sample_at(position))
                counts.samples += 1
    counts.seconds = time.perf_counter() - started
    return counts


def row_of(counts: Counts, *, downloads: float | None = None) -> Row:
    """The counts as columns of the table."""
    return {
        "opens_per_sample": counts.opens / counts.samples,
        "reads_per_sample": counts.reads / counts.samples,
        "bytes_per_sample": counts.num_bytes / counts.samples,
        "samples_per_s": counts.samples / counts.seconds,
        "downloads": downloads,
    }


def make_set(folder: Path, *, num_shards: int, per_shard: int) -> Manifest:
    """A set of small images whose keys are the same in length, so that all shards have one size."""
    folder.mkdir()
    image, label = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (9, 9)).save(image, "JPEG")
    Image.new("L", (9, 9)).save(label, "PNG")
    tars = []
    for number in range(num_shards):
        tars.append(folder / f"train-{number:06d}.tar")
        with tarfile.open(tars[-1], "w") as tar:
            for sample in range(per_shard):
                for ending, content in (("jpg", image.getvalue()), ("png", label.getvalue())):
                    member = tarfile.TarInfo(f"{number:06d}_{sample:06d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    labels = LabelSpace(("background", "thing"), 255)
    write_manifest(tars, folder / "train.json", Draft("train", labels, SetContents(2)))
    return load_manifest(folder / "train.json")


@contextlib.contextmanager
def slow_store(folder: Path, *, latency_s: float) -> Iterator[Server]:
    """Serve the folder by HTTP, each answer after a while, as an object store does."""
    store = Server()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(latency_s)
            if self.path.endswith(".tar"):
                store.asked.append(self.path)
            super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: what was asked for is counted."""

    def handler(*args: object, **options: object) -> Handler:
        return Handler(*args, directory=str(folder), **options)  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        store.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
