"""What a run says about itself: at its start, and during training."""

import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_deeplab.config import RunConfig, changed_from_defaults, flatten
from dist_deeplab.data.shards.checks import count_shared
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.process_group import DistEnv, gather_to_all, ranks_on_host
from dist_deeplab.logs import format_count, format_duration
from dist_deeplab.model.weights import SCRATCH
from dist_deeplab.redaction import redact
from dist_deeplab.tracking.provenance import git_revision, host_name, library_versions, summarize
from dist_deeplab.training.memory_estimate import estimate_memory
from dist_deeplab.training.optim import describe_groups
from dist_deeplab.training.run import Run
from dist_deeplab.training.state import TrainState
from dist_deeplab.workers import num_cores

log = logging.getLogger(__name__)


def describe(run: Run, state: TrainState) -> None:
    """Log what is about to happen."""
    config, env, split = run.config, run.env, run.split
    train_set, val_set, variant = run.train_set, run.val_set, run.variant
    own = bool(config.model.init) and variant.family == SCRATCH.family  # a checkpoint that began with random weights
    log.info("run %s on %d x %s (%s)", config.run_dir, env.world_size, device_name(env), env.launcher)
    log.info(
        "network %s, %s batch norm, %s, %s",
        config.model.backbone,
        config.model.batch_norm_used,
        config.precision.dtype,
        f"the weights of {config.model.init}" if own else variant.family,
    )
    if config.model.train_only == "head":
        log.info("model.train_only=head: only the last layers learn; the backbone and its statistics are frozen")
    if config.deterministic:
        log.info("deterministic: the same hardware and number of ranks repeat this run bit by bit, at lower speed")
    if variant.family == SCRATCH.family and not config.model.init and not state.step:
        log.info("no model.init: all weights are random; the published scores start from ImageNet or COCO weights")
    if variant.note:
        log.warning("NOTE on these weights: %s", variant.note)
    missing = "a dry run does not score them" if config.data.val else "no data.val, so there will be no score"
    validated = f", validated on {val_set.num_samples}" if val_set else f"; {missing}"
    log.info("data %s: %s%s", train_set.path, format_count(train_set.num_samples, "sample"), validated)
    for note in packing_notes(train_set, val_set):
        log.info("  %s", note)
    if shared := env.on_main(shared_images, train_set, val_set):
        log.warning(
            "WARNING: %d of the %d validation images have the names of training images; if they are the same images, "
            "their scores are not validation scores",
            shared,
            val_set.num_samples if val_set else 0,
        )
    if config.data.num_workers * ranks_on_host() > num_cores():
        log.info(
            "data.num_workers=%d for each of %s here is more than the %s that may be used",
            config.data.num_workers,
            format_count(ranks_on_host(), "rank"),
            format_count(num_cores(), "core"),
        )
    if weights := config.loss.class_weights:
        named = sorted(zip(map(float, weights), train_set.class_names, strict=True))
        log.info("loss.class_weights: from %g (%s) to %g (%s)", *named[0], *named[-1])
    log.info("%s", split)
    log.info("%s", estimate_memory(config, variant).describe(split.largest, config.data.crop_size))
    recipe = RunConfig()
    if split.global_size != recipe.batch.global_size:
        suggestion = recipe.optim.lr * split.global_size / recipe.batch.global_size
        log.info(
            "optim.lr is %g; the recipe's, scaled linearly to %s, is %g",
            config.optim.lr,
            format_count(split.global_size, "image"),
            suggestion,
        )
    for line in describe_groups(state.optimizer):
        log.info("  %s", line)
    log.info("from step %d to %d", state.step, config.max_steps)


def packing_notes(train_set: Manifest, val_set: Manifest | None) -> list[str]:
    """What was done to images when the sets were made, each with its set."""
    sets = {"train": train_set, **({"val": val_set} if val_set else {})}
    return [f"{name}: {note}" for name, manifest in sets.items() for note in manifest.notes]


def shared_images(train_set: Manifest, val_set: Manifest | None) -> int:
    """Images of the validation set that are trained on, by their keys."""
    return count_shared(train_set.key_hashes, val_set) if val_set else 0


def window_values(run: Run, state: TrainState, rates: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """What the steps since the last log line were like; every rank calls it, and waits for its device."""
    state.losses.reduce(state.step)
    values = state.losses.pop_mean() | {f"lr/{group}": float(rate) for group, rate in rates.items()}
    values |= run.session.meter.pop(images_per_step=run.split.global_size, device=run.env.device)
    return values | run.session.rank_times.record(state.step, values)


def log_progress(run: Run, step: int, values: dict[str, float]) -> None:
    """Log one line of progress; the remaining time counts the evaluations to come, as long as the last one each."""
    max_steps = run.config.max_steps
    num_evaluations = evaluations_left(run.config, step) if run.val_set else 0
    seconds = (max_steps - step) * values["time/step_s"] + num_evaluations * (run.session.meter.evaluation_s or 0.0)
    remaining = format_duration(seconds)
    if num_evaluations and run.session.meter.evaluation_s is None:
        remaining += f" and {format_count(num_evaluations, 'evaluation')}"
    share = 100 * values["time/data_s"] / values["time/step_s"]
    log.info(
        "step %*d/%d  loss %.4f  lr %.3g  %.1f images/s  data wait %.0f%%  ETA %s",
        int(math.log10(max_steps)) + 1,
        step,
        max_steps,
        values["train/loss"],
        next(value for name, value in values.items() if name.startswith("lr/")),
        values["images_per_s"],
        share,
        remaining,
    )


def evaluations_left(config: RunConfig, step: int) -> int:
    """Number of evaluations after step `step`: each `eval.every` steps, and one at the end."""
    last, every = config.max_steps, config.eval.every
    return 0 if step >= last else 1 + ((last - 1) // every - step // every if every else 0)


def run_info(run: Run) -> dict[str, Any]:
    """What MLflow should know about the run, as plain values for run.json; every rank must call it.

    Empty on all ranks but the main one, which asks git, reads the index for images in both sets, and so on.
    """
    ranks = gather_to_all((host_name(), device_name(run.env)))
    return run.env.on_main(_run_info, run, ranks) or {}


def _run_info(run: Run, ranks: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`run_info`, given host and device of each rank."""
    config, train_set, val_set = run.config, run.train_set, run.val_set
    changed = changed_from_defaults(config)
    tags = {
        "command": shlex.join(redact(argument) for argument in sys.argv),
        "world_size": run.env.world_size,
        "hosts": summarize(host for host, _ in ranks),
        "device": summarize(device for _, device in ranks),
        "accumulation": run.split.accumulation,
        "train_samples": train_set.num_samples,
        **library_versions(),
        **git_revision(),
    }
    if shared := shared_images(train_set, val_set):
        tags["validation_images_trained_on"] = shared
    sets = {"training": train_set, **({"validation": val_set} if val_set else {})}
    return {
        "name": config.name,
        "parameters": flatten(config),
        "tags": tags,
        "changed": changed,
        "description": _description(changed),
        "datasets": [_dataset(context, manifest) for context, manifest in sets.items()],
        "parent": config.tracking.parent,
        "log_model": config.tracking.log_model or bool(config.tracking.register_as),
        "register_as": config.tracking.register_as,
    }


def _description(changed: Mapping[str, Any]) -> str:
    """Markdown that MLflow shows above a run: what is not as in the published recipe.

    One paragraph: the page shows five lines of it until it is asked for more.
    """
    if not changed:
        return "All as in the defaults, which are the published recipe."
    settings = ", ".join(f"`{key}={value}`" for key, value in changed.items())
    return f"Not as in the defaults, which are the published recipe: {settings}"


def _dataset(context: str, manifest: Manifest) -> dict[str, Any]:
    """A set of samples as MLflow shows it; the digest is of its keys, however it is sharded."""
    return {
        "name": f"{manifest.path.parent.name}/{manifest.split}",
        "context": context,
        "digest": manifest.keys_sha256[:16],
        "source": str(manifest.path),
        "profile": {
            "num_samples": manifest.num_samples,
            "num_classes": manifest.num_classes,
            "ignore_label": manifest.ignore_label,
            "num_shards": len(manifest.shards),
            "keys_sha256": manifest.keys_sha256,
        },
    }


def device_name(env: DistEnv) -> str:
    """Name of the device: NVIDIA H100 80GB HBM3, or CPU."""
    return torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else "CPU"
