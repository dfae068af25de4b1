"""Train DeepLab-v2 on WebDataset shards: on one device, one node or many.

    python -m dist_deeplab.train --config configs/quickstart.yaml
    torchrun --nproc_per_node 8 -m dist_deeplab.train --config configs/voc_resnet101.yaml \\
        data.train=data/voc/train.json data.val=data/voc/val.json batch.global_size=16

Without --config the defaults apply: the published recipe. `section.key=value` overrides any key; --print-config shows
all of them, --dry-run measures speed and memory. Everything goes to <output_dir>/<name>/; starting again with
the same arguments resumes from the newest checkpoint.
Exit codes: 0 done, 1 error, 2 wrong arguments or configuration, 75 stopped early but saved.
"""

import argparse
import contextlib
import functools
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from dist_deeplab import config as configuration
from dist_deeplab.command_line import command_name
from dist_deeplab.comparison.record import read_folder
from dist_deeplab.comparison.report import save_figure
from dist_deeplab.config import RunConfig
from dist_deeplab.distributed.launcher import hard_exit, refuse_restart, run_command
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import STOPPED_EARLY
from dist_deeplab.evaluation import validation
from dist_deeplab.evaluation.crf import require_crf
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.logs import format_count, setup_logging
from dist_deeplab.tracking.mlflow.store import require_known_store
from dist_deeplab.tracking.tracker import resolve_uri
from dist_deeplab.training.assembly import assemble
from dist_deeplab.training.bad_samples import BadSamples
from dist_deeplab.training.builders import build_step, build_tracker, images_per_s_at_peak, open_session, split_batch
from dist_deeplab.training.data_builders import build_train_loader, follow_manifest, open_data
from dist_deeplab.training.dry_run import dry_run
from dist_deeplab.training.memory import explained_out_of_memory
from dist_deeplab.training.optim import poly_lr, set_lr
from dist_deeplab.training.profiling import profiled
from dist_deeplab.training.resume import forget_lost_best, save_checkpoint
from dist_deeplab.training.run import Run
from dist_deeplab.training.state import TrainState
from dist_deeplab.training.summary import describe, log_progress, window_values

log = logging.getLogger("dist_deeplab.train")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda env: command(arguments, env))


def command(arguments: argparse.Namespace, env: DistEnv) -> int:
    """Do what the arguments ask for; the exit code."""
    config = configuration.load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        env.on_main(sys.stdout.write, configuration.config_to_yaml(config))
        return 0
    if arguments.dry_run:
        return dry_run(config, env, functools.partial(start, scored=False))
    return start(config, env, profile=arguments.profile)


def start(config: RunConfig, env: DistEnv, *, profile: bool = False, scored: bool = True) -> int:
    """Check all that can be checked before any heavy work, then train; the exit code. Every rank calls it.

    profile: trace some steps. scored: evaluate on data.val, which a dry run does not.
    """
    env = replace(env, device_kind=config.device)
    train_set, val_set = open_data(config, env)
    config = follow_manifest(config, train_set)
    require_crf(config.eval.crf)
    require_known_store(resolve_uri(config.tracking.uri.real, config.output_dir))
    split = split_batch(config, env)
    with open_session(config, env) as session:
        setup_logging(to_terminal=env.is_main, rank=env.rank, folder=config.run_dir / "logs")
        run, model, state = assemble(config, env, split, (train_set, val_set if scored else None), session)
        trace = config.run_dir / "profile" / f"rank_{env.rank}.json.gz" if profile else None
        exit_code = train(run, model, state, trace=trace)
    if exit_code == STOPPED_EARLY and session.stop.ends_launch:
        refuse_restart()
    return exit_code


def train(run: Run, model: nn.Module, state: TrainState, *, trace: Path | None = None) -> int:
    """Train to `max_steps`; the exit code. Every rank calls it.

    Args:
        run: what is trained, on what, and where its results go.
        model: the network as it is trained, with the other ranks.
        state: weights, optimizer and progress, which this changes.
        trace: file to profile to.
    """
    config, meter, stop = run.config, run.session.meter, run.session.stop

    # --- 1. What is about to happen, if anything ----------------------------------------------------------------------
    describe(run, state)
    run.session.report("running", state.step)
    if state.step >= config.max_steps and not state.pending_evaluation:
        log.info("nothing to do: %s is done (step %d of %d)", config.run_dir, state.step, config.max_steps)
        run.session.report("done", state.step)
        return 0

    # --- 2. Data, update, tracking ------------------------------------------------------------------------------------
    step = build_step(run, state, model)
    inputs = step.inputs.ahead(build_train_loader(run, start=state.step), lambda: bool(stop))
    bad_samples = BadSamples.open(config.run_dir, config.data.max_bad_samples, run.env, start=state.step)
    run = replace(run, tracker=build_tracker(run))

    # --- 3. The loop: one iteration is one optimizer step -------------------------------------------------------------
    with run.tracker, contextlib.closing(run.checkpoints):
        if state.pending_evaluation and evaluate_and_save(run, state):
            return stop_early(run, state)
        meter.start(images_per_s_at_peak(run, state.net))
        for step_input in run.session.steps(profiled(inputs, trace, num_steps=config.max_steps - state.step)):
            rates = set_lr(state.optimizer, poly_lr(state.schedule_step, config.optim, max_steps=config.max_steps))
            with explained_out_of_memory(config, run.split):
                result = step.update(step_input)
            meter.waited(result.wait_s)
            state.advance(result, step_input.batches)
            bad_samples.take(state.step, step_input.batches, result.num_bad)
            if state.step == config.max_steps or is_due(state.step, config.tracking.log_every):
                values = window_values(run, state, rates)
                run.tracker.log(state.step, values | bad_samples.values())
                log_progress(run, state.step, values)
            with run.session.paused():
                stopping = evaluate_and_save(run, state, asked_to_stop=result.stop)
            if stopping:
                return stop_early(run, state)
        return finish(run, state)


def evaluate_and_save(run: Run, state: TrainState, *, asked_to_stop: bool = False) -> bool:
    """Evaluate and save what is due after the step; whether the run is to stop now. Every rank calls it.

    A run that ends, or that makes up for an evaluation that was cut short, waits until the checkpoint is on disk.
    """
    config, was_pending = run.config, state.pending_evaluation
    last = state.step >= config.max_steps
    is_best = (was_pending or last or is_due(state.step, config.eval.every)) and validate(run, state)
    stopping = (asked_to_stop and not last) or state.pending_evaluation
    wait = last or stopping or was_pending
    if wait or is_best or is_due(state.step, config.checkpoint.every):
        save_checkpoint(run, state, is_best=is_best, wait=wait)
    run.tracker.log(state.step, run.checkpoints.pop_values())
    return stopping


def validate(run: Run, state: TrainState) -> bool:
    """Score the network on the validation set, if there is one; whether it is the best so far. Every rank calls it.

    Asked to stop meanwhile, it ends early and leaves the evaluation pending in `state`, for the next start.
    """
    if run.val_set is None:
        return False
    predictor = Predictor.build(state.net, run.variant.preprocessing, run.config.eval, dtype=run.config.precision.dtype)
    scored = validation.Validation(run.val_set, run.config, run.session, run.tracker)
    miou = validation.score(scored, predictor, step=state.step)
    state.pending_evaluation = miou is None
    forget_lost_best(run, state)
    if miou is None:
        return False
    is_best = state.update_best(miou, run.val_set.keys_sha256)
    run.tracker.log(state.step, {"val/best_mIoU": state.best_miou})
    return is_best


def finish(run: Run, state: TrainState) -> int:
    """Say that the run is done and draw its curves; the exit code."""
    folder = run.config.run_dir
    run.session.report("done", state.step)
    run.tracker.log_files(state.step, lambda: [save_figure([read_folder(folder)], folder / "curves.png")])
    run.tracker.finished()
    log.info("done: %s; the run is in %s", format_count(state.step, "step"), folder)
    return 0


def stop_early(run: Run, state: TrainState) -> int:
    """Say that the run was asked to stop and is saved; the exit code."""
    reason = run.session.stop.reason or "as another rank was asked to"
    run.session.report("stopped", state.step)
    run.tracker.stopped()
    log.warning("stopped (%s), saved step %d; the same command continues from there", reason, state.step)
    return STOPPED_EARLY


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


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


if __name__ == "__main__":
    hard_exit(main())
