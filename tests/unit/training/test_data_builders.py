"""Sets that do not belong together are refused; how much of a set a node's cache must hold."""

import json
from pathlib import Path

import pytest

from dist_deeplab.config import load_config
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError
from dist_deeplab.training import data_builders
from dist_deeplab.training.data_builders import open_data


def test_training_and_validation_sets_of_other_classes_are_refused(shard_set: Manifest, own_set: Path) -> None:
    config = load_config(None, [f"data.train={shard_set.path}", f"data.val={own_set}"])
    assert open_data(config, DistEnv())[1] is not None
    content = json.loads(own_set.read_text())
    content["class_names"][3:5] = reversed(content["class_names"][3:5])
    own_set.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the class names of .* differ; make both from one list"):
        open_data(config, DistEnv())


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
