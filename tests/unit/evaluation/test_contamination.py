"""Images that were trained on are counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.config import RunConfig
from dist_deeplab.data.shards import manifest as shards
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.evaluation.contamination import Contamination, find_contamination
from dist_deeplab.model.weights import SCRATCH


def _trained_on(hashes: np.ndarray | None) -> Checkpoint:
    known = None if hashes is None else torch.from_numpy(hashes.view(np.int64).copy())
    return Checkpoint({}, RunConfig(), SCRATCH, (), train_key_hashes=known)


def test_the_set_itself_overlaps_wholly_and_others_by_their_keys(shard_set: Manifest) -> None:
    assert len(set(shard_set.key_hashes.tolist())) == shard_set.num_samples
    assert find_contamination(_trained_on(shard_set.key_hashes), shard_set) == Contamination(8, 8)
    assert find_contamination(_trained_on(shard_set.key_hashes[2:5]), shard_set) == Contamination(3, 8)
    assert find_contamination(_trained_on(shard_set.key_hashes[:0]), shard_set) == Contamination(0, 8)


def test_hashes_do_not_depend_on_the_order_of_the_samples(shard_set: Manifest, own_set: Path) -> None:
    hashes = load_manifest(own_set).key_hashes
    assert hashes.dtype == np.uint64
    assert (np.diff(hashes.view(np.int64) ^ np.int64(-(2**63))) > 0).all()  # sorted as unsigned numbers
    np.testing.assert_array_equal(hashes, shard_set.key_hashes)


def test_a_checkpoint_that_does_not_say_is_not_blamed(shard_set: Manifest) -> None:
    assert find_contamination(_trained_on(None), shard_set) is None


def test_of_sets_too_large_to_be_listed_the_share_is_extrapolated(
    own_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_KEY_HASHES", 4)
    monkeypatch.setattr("dist_deeplab.data.shards.checks.MAX_KEY_HASHES", 4)
    manifest = load_manifest(own_set)
    assert len(manifest.key_hashes) == 4
    assert find_contamination(_trained_on(manifest.key_hashes), manifest) == Contamination(8, 8)
    assert find_contamination(_trained_on(manifest.key_hashes[[0, 3]]), manifest) == Contamination(4, 8)


def test_the_warning_is_loud_and_says_how_many() -> None:
    assert str(Contamination(3, 12)).startswith("WARNING: 3 of these 12 images (25 %) have the names of")
