"""Contamination: how many of the scored images the network was trained on."""

from dataclasses import dataclass

import numpy as np

from dist_deeplab.checkpointing.checkpoint import Checkpoint
from dist_deeplab.data.shards.checks import count_shared
from dist_deeplab.data.shards.manifest import Manifest


@dataclass(frozen=True)
class Contamination:
    """Images of the scored set with the keys of training samples."""

    num_images: int
    num_scored: int

    def __str__(self) -> str:
        share = 100 * self.num_images / self.num_scored
        return (
            f"WARNING: {self.num_images:,} of these {self.num_scored:,} images ({share:.0f} %) have the names of "
            "images that were trained on; if they are the same images, this is not a validation score"
        )


def find_contamination(checkpoint: Checkpoint, manifest: Manifest) -> Contamination | None:
    """The images that a checkpoint was trained on and a set holds; None where the checkpoint does not say."""
    if checkpoint.train_key_hashes is None:
        return None
    trained = checkpoint.train_key_hashes.numpy().view(np.uint64)
    return Contamination(count_shared(trained, manifest), manifest.num_samples)
