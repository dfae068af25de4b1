"""Train DeepLab-v2 on WebDataset shards: on one device, one node or many.

    python -m dist_deeplab.train --config configs/quickstart.yaml
    torchrun --nproc_per_node 8 -m dist_deeplab.train --config configs/voc_resnet101.yaml \\
        data.train=data/voc/train.json data.val=data/voc/val.json batch.global_size=16

Without --config the defaults apply: the published recipe. `section.key=value` overrides any key; --print-config shows
all of them, --dry-run tells speed and memory beforehand. Everything goes to <output_dir>/<name>/; starting again with
the same arguments goes on from the newest checkpoint.
Exit codes: 0 done, 1 error, 2 wrong arguments or configuration, 75 stopped early but saved.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab import config as configuration
from dist_deeplab.checkpointing.folder import CheckpointFolder
from dist_deeplab.command_line import command_name
from dist_deeplab.comparison.record import read_folder
from dist_deeplab.comparison.report import save_figure
from dist_deeplab.config import RunConfig
from dist_deeplab.data.order import BatchSplit
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.launcher import hard_exit, refuse_restart, run_command
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.errors import STOPPED_EARLY
from dist_deeplab.evaluation import validation
from dist_deeplab.evaluation.crf import require_crf
from dist_deeplab.logs import setup_logging
from dist_deeplab.model.weights import Variant
from dist_deeplab.tracking.mlflow.store import require_known_store
from dist_deeplab.tracking.tracker import Tracker, resolve_uri
from dist_deeplab.training.assembly import assemble
from dist_deeplab.training.bad_samples import BadSamples
from dist_deeplab.training.builders import (
    build_checkpoints,
    build_step,
    build_tracker,
    build_train_loader,
    follow_manifest,
    images_per_s_at_peak,
    open_data,
    open_session,
    split_batch,
)
from dist_deeplab.training.dry_run import rehearse
from dist_deeplab.training.memory import explained_out_of_memory
from dist_deeplab.training.optim import poly_lr, set_lr
from dist_deeplab.training.profiling import profiled
from dist_deeplab.training.resume import find_checkpoint, forget_lost_best, save_checkpoint
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.summary import describe, log_progress, run_info, window_values

log = logging.getLogger("dist_deeplab.train")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda env: command(arguments, env))


def command(arguments: argparse.Namespace, env: DistEnv) -> int:
    """Do what the arguments ask for and return the exit code."""
    config = configuration.load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        env.on_main(sys.stdout.write, configuration.config_to_yaml(config))
        return 0
    if arguments.dry_run:
        return rehearse(config, env, start)
    return start(config, env, profile=arguments.profile)


def start(config: RunConfig, env: DistEnv, *, profile: bool = False) -> int:
    """Check all that can be checked before any heavy work, then train; return the exit code. Every rank calls it."""
    train_set, val_set = open_data(config, env)
    config = follow_manifest(config, train_set)
    require_crf(config.eval.crf)
    require_known_store(resolve_uri(config.tracking.uri.real, config.output_dir))
    split = split_batch(config, env)
    with open_session(config, env) as run:
        trace = config.run_dir / "profile" / f"rank_{env.rank}.json.gz" if profile else None
        exit_code = train(config, env, split, train_set, val_set, run, trace=trace)
    if exit_code == STOPPED_EARLY and run.stop.ends_launch:
        refuse_restart()
    return exit_code


def train(
    config: RunConfig,
    env: DistEnv,
    split: BatchSplit,
    train_set: Manifest,
    val_set: Manifest | None,
    run: TrainingSession,
    *,
    trace: Path | None = None,
) -> int:
    """Train to `config.max_steps` and return the exit code; every rank calls it. `trace`: file to profile to."""
    # --- 1. Where to start from ---------------------------------------------------------------------------------------
    setup_logging(to_terminal=env.is_main, rank=env.rank, folder=config.run_dir / "logs")
    meter, stop = run.meter, run.stop
    checkpoints = build_checkpoints(config, env)
    saved = find_checkpoint(config, checkpoints, train_set)

    # --- 2. Network, optimizer, state ---------------------------------------------------------------------------------
    split, variant, model, state = assemble(config, env, split, saved, val_set)
    describe(config, env, split, train_set, val_set, state, variant)
    run.report("running", state.step)
    if state.step >= config.max_steps and not state.owes_evaluation:
        log.info("nothing to do: %s is done (step %d of %d)", config.run_dir, state.step, config.max_steps)
        run.report("done", state.step)
        return 0

    # --- 3. Data, update, tracking ------------------------------------------------------------------------------------
    batches = build_train_loader(config, env, split, train_set, start=state.step)
    update = build_step(config, env, split, state, model, variant)
    bad_samples = BadSamples.open(config.run_dir, config.data.max_bad_samples, env, start=state.step)
    tracker = build_tracker(config, env, run_info(config, env, split, train_set, val_set))
    score = functools.partial(validate, config, env, state, variant, val_set, tracker, run, checkpoints)
    save = functools.partial(save_checkpoint, config, checkpoints, state, variant, train_set)

    # --- 4. The loop: one turn is one optimizer step ------------------------------------------------------------------
    status = "FAILED"
    try:
        if state.owes_evaluation:
            save(is_best=score(), wait=True)
            if state.owes_evaluation:
                status = "KILLED"
                return stop_early(run, state)
        meter.start(images_per_s_at_peak(config, env, state.net))
        for _, micro_batches in run.steps(profiled(batches, trace)):
            rates = set_lr(state.optimizer, poly_lr(state.schedule_step, config.optim, max_steps=config.max_steps))
            with explained_out_of_memory(config, split):
                result = update(micro_batches, stop=bool(stop))
            meter.waited(result.wait_s)
            state.advance(result, micro_batches)
            bad_samples.take(state.step, micro_batches, result.num_bad)
            last = state.step == config.max_steps
            if last or is_due(state.step, config.tracking.log_every):
                values = window_values(state, run, rates, images_per_step=split.global_size, env=env)
                tracker.log(state.step, values | bad_samples.values())
                log_progress(state.step, config.max_steps, values)
            with run.paused():
                is_best = (last or is_due(state.step, config.eval.every)) and score()
                stopping = (result.stop and not last) or state.owes_evaluation
                ending = last or stopping
                if ending or is_best or is_due(state.step, config.checkpoint.every):
                    save(is_best=is_best, wait=ending)
                tracker.log(state.step, checkpoints.pop_values())
            if stopping:
                status = "KILLED"
                return stop_early(run, state)
        status = "FINISHED"
        return finish(config, run, state, tracker)
    finally:
        checkpoints.close()
        tracker.close(status)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("train"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of keys that differ from the defaults")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="some real steps that leave nothing behind: speed, memory"
    )
    parser.add_argument(
        "--profile", action="store_true", help="trace steps 8 to 11 to <run>/profile/ (open it at ui.perfetto.dev)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key, e.g. optim.lr=1e-3")
    return parser.parse_intermixed_args(argv)


def validate(
    config: RunConfig,
    env: DistEnv,
    state: TrainState,
    variant: Variant,
    val_set: Manifest | None,
    tracker: Tracker,
    run: TrainingSession,
    checkpoints: CheckpointFolder,
) -> bool:
    """Score the network on `val_set`, if there is one, and return whether it is the best so far; every rank calls it.

    Asked to stop meanwhile, it leaves off, and `state` owes an evaluation to the next start.
    """
    if val_set is None:
        return False
    miou = validation.score(state.net, val_set, config, variant.preprocessing, tracker, step=state.step, session=run)
    state.owes_evaluation = miou is None
    forget_lost_best(state, checkpoints)
    is_best = miou is not None and state.take_score(miou, val_set.keys_sha256)
    if miou is not None:
        tracker.log(state.step, {"val/best_mIoU": state.best_miou})
    return is_best


def finish(config: RunConfig, run: TrainingSession, state: TrainState, tracker: Tracker) -> int:
    """Say that the run is done, draw its curves, and return the exit code."""
    run.report("done", state.step)
    tracker.log_files(state.step, lambda: [save_figure([read_folder(config.run_dir)], config.run_dir / "curves.png")])
    log.info("done: %d steps; the run is in %s", state.step, config.run_dir)
    return 0


def stop_early(run: TrainingSession, state: TrainState) -> int:
    """Say that the run was asked to stop and is saved, and return the exit code."""
    run.report("stopped", state.step)
    log.warning("stopped (%s), saved step %d; the same command goes on from there", run.stop.reason, state.step)
    return STOPPED_EARLY


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens each `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


if __name__ == "__main__":
    hard_exit(main())
