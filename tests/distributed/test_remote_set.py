"""A set at a slow server on two nodes: with `data.shuffle=blocks` each downloads its half, and holds little of it."""

from pathlib import Path

from tests.distributed.remote_set import NODES, make_remote_set, read_epoch


def test_with_blocks_a_node_downloads_its_share_and_with_full_all(tmp_path: Path) -> None:
    manifest = make_remote_set(tmp_path / "set", num_shards=80, per_shard=4)
    for shuffle, most in (("blocks", 1.1 / NODES), ("full", 1.0)):
        nodes = read_epoch(manifest, tmp_path, shuffle, latency_s=0.01, bytes_per_s=1_000_000)
        keys = [key for node in nodes for key in node.keys]
        assert len(keys) == len(set(keys)) == manifest.num_samples
        for node in nodes:
            assert 0.8 * most * 80 <= len(node.downloads) <= most * 80
