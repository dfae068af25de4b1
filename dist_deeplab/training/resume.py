"""Which checkpoint a run continues from, what is taken from it, and how the run is saved."""

import logging
from pathlib import Path

import numpy as np
import torch

from dist_deeplab.checkpointing.checkpoint import Checkpoint, read_checkpoint, read_on_main
from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.config import RunConfig, recipe_differences, score_settings
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.from_main import load_on_main
from dist_deeplab.distributed.parallel import share_buffers
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.replicas import check_replicas
from dist_deeplab.errors import UserError, first_line
from dist_deeplab.tracking.mlflow.state import mlflow_run_id
from dist_deeplab.tracking.provenance import installed_versions
from dist_deeplab.training.run import Run
from dist_deeplab.training.state import TrainState

_LIBRARIES = ("torch", "numpy", "opencv-python-headless")  # those that a run's numbers depend on

log = logging.getLogger(__name__)


def checkpoint_of(run: Run, state: TrainState) -> Checkpoint:
    """The run as it stands, for a file. What has to be read from files is known to the writer alone."""
    on_main = run.env.on_main
    return Checkpoint(
        state=state.state_dict(),
        config=run.config,
        variant=run.variant,
        class_names=tuple(run.train_set.class_names),
        train_keys_sha256=run.train_set.keys_sha256,
        train_key_hashes=on_main(lambda: torch.from_numpy(run.train_set.key_hashes.view(np.int64))),
        train_contents=on_main(lambda: run.train_set.contents) or "",
        train_index_sha256=run.train_set.index_sha256,
        mlflow_run_id=on_main(mlflow_run_id, run.config.run_dir) or "",
        versions=on_main(installed_versions, _LIBRARIES) or {},
    )


def find_checkpoint(
    config: RunConfig, env: DistEnv, folder: CheckpointFolder, train_set: Manifest
) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks, or None to start at step 0.

    Every rank must call it; the main one finds and reads it.

    Raises:
        UserError: resume=never in a used folder; no readable checkpoint among those there; one of another recipe or
            of other training samples (the differences are listed), unless resume_anyway.
    """
    saved = read_on_main(env, lambda: _read(config, folder))
    if saved is None:
        return None
    changes = recipe_differences(saved.config, config)
    changes += _data_differences(saved, train_set, env)
    if changes and not config.resume_anyway:
        raise UserError(
            f"{saved} is of another recipe ({'; '.join(changes)}); restore these settings, choose another name=, or "
            "continue with the changes by resume_anyway=true"
        )
    for change in changes:
        log.warning("continuing from %s with a change: %s", saved, change)
    if config.model.init and str(config.model.init) != str(saved.config.model.init):
        log.warning("model.init is not read by a run that resumes: its weights are those of %s", saved)
    return saved


def _data_differences(saved: Checkpoint, train_set: Manifest, env: DistEnv) -> list[str]:
    """How the training set differs from that of the checkpoint; every rank must call it."""
    names, old_names = tuple(train_set.class_names), saved.class_names
    if names != old_names:
        label = next((k for k, pair in enumerate(zip(names, old_names)) if len(set(pair)) == 2), None)
        if label is None:
            return [f"data.train: {len(old_names)} -> {len(names)} classes"]
        return [f"data.train: class {label}: {old_names[label]} -> {names[label]}"]
    if saved.train_keys_sha256 != train_set.keys_sha256:
        return ["data.train: other samples"]
    if saved.train_index_sha256 == train_set.index_sha256:
        return []  # without reading it: of a large set it has gigabytes
    if saved.train_contents and load_on_main(env, lambda: train_set.contents) != saved.train_contents:
        return ["data.train: other images or labels of the same names"]
    return []


def _read(config: RunConfig, folder: CheckpointFolder) -> Checkpoint | None:
    """The newest checkpoint in the folder, else that of `resume=PATH`, else None; for the main rank."""
    if config.resume == "never" and folder.has_any():
        raise UserError(f"{folder.path} holds checkpoints and resume=never; choose another name=, nothing was touched")
    saved = folder.read_newest(read_checkpoint)
    if saved is not None:
        return saved
    if folder.has_any():
        raise UserError(f"no checkpoint in {folder.path} can be read; move them away to start again under this name")
    if config.resume in ("auto", "never"):
        return None
    path = Path(config.resume).expanduser()  # a start for an empty folder; from then on its own checkpoints count
    saved = read_checkpoint(path)
    stays_behind = path.parent.resolve() != folder.path.resolve()  # this folder gets a best.pt of its own
    return saved.without_score() if stays_behind else saved


def restore(state: TrainState, saved: Checkpoint, config: RunConfig, val_set: Manifest | None) -> None:
    """Set `state` to a checkpoint's. A best score of other images, or by other means, is dropped: it does not compare.

    Raises:
        UserError: it is of a network or optimizer of another shape (possible with resume_anyway only).
    """
    try:
        state.load_state_dict(saved.state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint of step {saved.step} does not fit this network and optimizer ({first_line(error)}); to "
            "start from its weights alone choose another name= and set model.init to it"
        ) from None
    state.pending_evaluation = state.pending_evaluation and val_set is not None
    other_images = val_set and state.scored_keys_sha256 not in ("", val_set.keys_sha256)
    if state.best_miou >= 0 and (other_images or score_settings(saved.config) != score_settings(config)):
        what = "the validation images are other ones" if other_images else "eval.* or crf.* scores in another way"
        log.warning("%s than before: the best score so far no longer counts", what)
        state.best_miou = -1.0
    versions = installed_versions(_LIBRARIES)
    for name, old in saved.versions.items():
        if versions.get(name) != old:
            log.warning("%s is %s now, it was %s: numbers may differ in the last digits", name, versions.get(name), old)


def save_checkpoint(run: Run, state: TrainState, *, is_best: bool, wait: bool) -> None:
    """Save, once losses are known to be finite and the ranks' networks to be the same; every rank calls it.

    Written in the background, or with `wait`, for a run about to end, before this returns.
    """
    state.losses.reduce(state.step)
    local = run.config.model.batch_norm == "local"
    check_replicas(state.net, buffers=not local, when=f"at step {state.step}")
    if local:
        share_buffers(state.net)
    forget_lost_best(run, state)
    run.checkpoints.save(checkpoint_of(run, state).to_content(), step=state.step, is_best=is_best, wait=wait)


def forget_lost_best(run: Run, state: TrainState) -> None:
    """Take the best score back where its checkpoint could not be written; every rank calls it.

    Otherwise a run would wait for a still higher one, and until then have no `best.pt`, or one that is not the best.
    """
    if run.checkpoints.lost_best():
        log.warning(
            "the best score so far, mIoU %.4f, no longer counts: its checkpoint could not be written, best.pt is %s",
            state.best_miou,
            f"that of {state.best_before:.4f}" if state.best_before >= 0 else "not there yet",
        )
        state.best_miou = state.best_before
