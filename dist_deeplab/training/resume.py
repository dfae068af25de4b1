"""What a checkpoint of a run holds beside its state, and which one a run goes on from."""

from pathlib import Path
from typing import Any

import torch

from dist_deeplab.config import RunConfig, config_to_dict, recipe_differences
from dist_deeplab.data.shards import Manifest
from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import Variant
from dist_deeplab.runtime.checkpoint import CheckpointFolder, load_checkpoint
from dist_deeplab.runtime.parallel import share_buffers
from dist_deeplab.training.state import TrainState

_NEEDED = ("model", "optimizer", "step", "variant", "config", "class_names", "train_keys_sha256")


def checkpoint_content(config: RunConfig, state: TrainState, variant: Variant, train_set: Manifest) -> dict[str, Any]:
    """Return tensors and plain values: the state, and what evaluation, prediction and a resume need to know."""
    return {
        **state.state_dict(),
        "variant": variant.to_plain(),
        "config": config_to_dict(config),
        "class_names": list(train_set.class_names),
        "train_keys_sha256": train_set.keys_sha256,
        "torch": str(torch.__version__),
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a verified checkpoint that holds all that a run, evaluation and prediction need.

    Raises:
        UserError: missing, damaged or incomplete.
    """
    content = load_checkpoint(path)
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        raise UserError(f"the checkpoint {path} lacks {', '.join(missing)}; use another one")
    return content


def find_checkpoint(config: RunConfig, folder: CheckpointFolder, train_set: Manifest) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, the same on all ranks, or None to start at step 0.

    Raises:
        UserError: resume=never in a used folder; no readable checkpoint among those there; one of another recipe or
            of other training samples (the differences are listed).
    """
    if config.resume == "never" and folder.has_any():
        raise UserError(f"{folder.path} holds checkpoints and resume=never; choose another name=, nothing was touched")
    path = folder.newest()
    if path is None:
        if folder.has_any():
            raise UserError(f"no checkpoint in {folder.path} can be read; move them away to start anew under this name")
        if config.resume in ("auto", "never"):
            return None
        path = Path(config.resume).expanduser()  # a start for an empty folder; from then on its own checkpoints count
    saved = read_checkpoint(path)
    changes = recipe_differences(saved["config"], config)
    if saved["train_keys_sha256"] != train_set.keys_sha256:
        changes.append("data.train: other samples")
    if changes:
        raise UserError(f"{path} is of another recipe ({'; '.join(changes)}); undo that, or choose another name=")
    return saved


def save_checkpoint(
    config: RunConfig,
    checkpoints: CheckpointFolder,
    state: TrainState,
    variant: Variant,
    train_set: Manifest,
    *,
    is_best: bool,
) -> None:
    """Write a checkpoint, once the losses up to here are known to be finite; every rank calls it."""
    state.losses.reduce(state.step)
    if config.model.batch_norm == "local":
        share_buffers(state.net)
    content = checkpoint_content(config, state, variant, train_set)
    checkpoints.save(content, step=state.step, is_best=is_best)
