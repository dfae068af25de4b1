"""What a manifest tells about a set before anything is read: whether it can be trained on or scored."""

import numpy as np

from dist_deeplab.data.shards.manifest import MAX_KEY_HASHES, Manifest, ShardError


def require_trainable(manifest: Manifest) -> None:
    """Check that there is something to learn.

    Raises:
        ShardError: all labels are void, or of one class.
    """
    _require_labels(manifest, "train on")
    there = [name for name, pixels in zip(manifest.class_names, manifest.class_pixels, strict=True) if pixels]
    if len(there) == 1:
        raise ShardError(
            f"the set {manifest.path} holds pixels of one class alone ({there[0]}), so any network would score 100 %; "
            "if its masks hold 0 and 255, pack them with a label map that names both (void is 255)"
        )


def require_scorable(manifest: Manifest) -> None:
    """Check that a set can be scored.

    Raises:
        ShardError: all labels are void, or images were cut into tiles: a score counts whole images.
    """
    _require_labels(manifest, "score")
    if manifest.tile_side:
        raise ShardError(
            f"the set {manifest.path} was cut into tiles of {manifest.tile_side} pixels, but scores are counted on "
            "whole images; pack it without --tile (evaluation takes large images in windows by itself)"
        )


def _require_labels(manifest: Manifest, use: str) -> None:
    if not any(manifest.class_pixels):
        raise ShardError(
            f"all labels of the set {manifest.path} are void ({manifest.ignore_label}): there is nothing to {use}; "
            "look at its masks and at what they call void"
        )


def count_shared(trained: np.ndarray, manifest: Manifest) -> int:
    """Images of a set whose keys are among those of `trained`, sorted uint64 hashes (see `Manifest.key_hashes`).

    Exact up to 2**20 samples on both sides; above that it is extrapolated from those whose keys' hashes are smallest.
    """
    scored = manifest.key_hashes
    cut = min((keys[-1] for keys in (trained, scored) if len(keys) == MAX_KEY_HASHES), default=None)
    comparable = scored if cut is None else scored[scored <= cut]
    common = int(np.isin(comparable, trained).sum())
    return common if cut is None else round(common / max(1, len(comparable)) * manifest.num_samples)
