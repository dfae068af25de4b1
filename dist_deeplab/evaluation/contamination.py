"""Honesty: how many of the scored images the network was trained on."""

from dataclasses import dataclass

import numpy as np

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.data.shards.manifest import MAX_KEY_HASHES, Manifest


@dataclass(frozen=True)
class Contamination:
    """Images of the scored set that were training samples too, by their keys."""

    num_images: int
    num_scored: int

    def __str__(self) -> str:
        share = 100 * self.num_images / self.num_scored
        return (
            f"WARNING: {self.num_images} of these {self.num_scored} images ({share:.0f} %) were trained on: this is no "
            "validation score"
        )


def find_contamination(checkpoint: Checkpoint, manifest: Manifest) -> Contamination | None:
    """The images that a checkpoint was trained on and a set holds; None where the checkpoint does not say.

    Exact up to 2**20 samples on both sides; above that it is extrapolated from those whose keys' hashes are smallest.
    """
    if checkpoint.train_key_hashes is None:
        return None
    trained, scored = checkpoint.train_key_hashes.numpy().view(np.uint64), manifest.key_hashes
    cut = min((keys[-1] for keys in (trained, scored) if len(keys) == MAX_KEY_HASHES), default=None)
    comparable = scored if cut is None else scored[scored <= cut]
    common = int(np.isin(comparable, trained).sum())
    if cut is not None:
        common = round(common / max(1, len(comparable)) * manifest.num_samples)
    return Contamination(common, manifest.num_samples)
