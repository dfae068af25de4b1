"""Images that were trained on are counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_deeplab.data.shards import manifest as shards
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.evaluation.contamination import Contamination, find_contamination


def _saved(manifest: Manifest, part: slice = slice(None)) -> dict[str, torch.Tensor]:
    return {"train_key_hashes": torch.from_numpy(manifest.key_hashes.view(np.int64)[part].copy())}


def test_the_set_itself_overlaps_wholly_and_others_by_their_keys(shard_set: Manifest) -> None:
    assert len(set(shard_set.key_hashes.tolist())) == shard_set.num_samples
    assert find_contamination(_saved(shard_set), shard_set) == Contamination(8, 8)
    assert find_contamination(_saved(shard_set, slice(2, 5)), shard_set) == Contamination(3, 8)
    assert find_contamination(_saved(shard_set, slice(0, 0)), shard_set) == Contamination(0, 8)


def test_hashes_do_not_depend_on_the_order_of_the_samples(shard_set: Manifest, own_set: Path) -> None:
    hashes = load_manifest(own_set).key_hashes
    assert hashes.dtype == np.uint64
    assert (np.diff(hashes.view(np.int64) ^ np.int64(-(2**63))) > 0).all()  # sorted as unsigned numbers
    np.testing.assert_array_equal(hashes, shard_set.key_hashes)


def test_a_checkpoint_that_does_not_say_is_not_blamed(shard_set: Manifest) -> None:
    assert find_contamination({}, shard_set) is None


def test_of_sets_too_large_to_be_listed_the_share_is_extrapolated(
    own_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_KEY_HASHES", 4)
    monkeypatch.setattr("dist_deeplab.data.shards.checks.MAX_KEY_HASHES", 4)
    manifest = load_manifest(own_set)
    assert len(manifest.key_hashes) == 4
    assert find_contamination(_saved(manifest), manifest) == Contamination(8, 8)
    half = {"train_key_hashes": _saved(manifest)["train_key_hashes"][[0, 3]]}
    assert find_contamination(half, manifest) == Contamination(4, 8)


def test_the_warning_is_loud_and_says_how_many() -> None:
    assert str(Contamination(3, 12)).startswith("WARNING: 3 of these 12 images (25 %) were trained on")
