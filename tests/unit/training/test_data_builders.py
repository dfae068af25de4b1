"""Sets that do not belong together are refused; how much of a set a node's cache must hold."""

import json
from pathlib import Path

import pytest

from dist_deeplab.config import load_config
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.training import data_builders
from dist_deeplab.training.data_builders import follow_manifest, open_data
from tests.file_server import serve


def test_training_and_validation_sets_of_other_classes_are_refused(shard_set: Manifest, own_set: Path) -> None:
    config = load_config(None, [f"data.train={shard_set.path}", f"data.val={own_set}"])
    assert open_data(config, DistEnv())[1] is not None
    content = json.loads(own_set.read_text())
    content["class_names"][3:5] = reversed(content["class_names"][3:5])
    own_set.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the class names of .* differ; make both from one list"):
        open_data(config, DistEnv())


def test_a_number_of_classes_that_was_given_is_compared_with_the_sets_and_not_replaced(shard_set: Manifest) -> None:
    assert follow_manifest(load_config(None), shard_set).data.num_classes == 21
    assert follow_manifest(load_config(None, ["data.num_classes=3"]), shard_set).data.num_classes == 3
    with pytest.raises(UserError, match=r"set data\.num_classes=21"):
        open_data(load_config(None, [f"data.train={shard_set.path}", "data.num_classes=3"]), DistEnv())


def test_a_set_that_a_nodes_cache_cannot_hold_is_refused_before_it_is_fetched(
    shard_set: Manifest, tmp_path: Path
) -> None:
    with serve(shard_set.path.parent) as server:
        where = [f"data.train={server.url}/train.json", f"data.cache_dir={tmp_path}"]
        gib = shard_set.size_bytes / 2**30
        assert open_data(load_config(None, [*where, f"data.cache_gib={1.01 * gib:.9f}"]), DistEnv())
        with pytest.raises(UserError, match=r"raise data\.cache_gib"):
            open_data(load_config(None, [*where, f"data.cache_gib={0.99 * gib:.9f}"]), DistEnv())
        assert not any(path.endswith(".tar") for path, _ in server.requests)


@pytest.mark.parametrize(("ranks_here", "num_nodes"), [(2, 4), (8, 1), (1, 8)])
def test_a_node_s_cache_holds_the_shards_of_its_own_groups(
    shard_set: Manifest, monkeypatch: pytest.MonkeyPatch, ranks_here: int, num_nodes: int
) -> None:
    monkeypatch.setattr(data_builders, "ranks_on_host", lambda: ranks_here)
    asked = []
    monkeypatch.setattr(data_builders.BlockShuffle, "cached_shards", lambda self, nodes: asked.append(nodes) or 2)
    config = load_config(None, ["data.shuffle=blocks"])
    env = DistEnv(rank=0, world_size=8, launcher="torchrun")
    largest = max(shard.size_bytes for shard in shard_set.shards)
    assert data_builders._cached_bytes(config, env, shard_set) == min(2 * largest, shard_set.size_bytes)
    assert asked == [num_nodes]
