"""Evaluation during a run: scores to its tracker, figures to its folder, a table to the log."""

import logging
import time
from dataclasses import dataclass

from dist_deeplab.config import RunConfig
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.distributed.parallel import share_buffers
from dist_deeplab.distributed.process_group import ranks_on_host
from dist_deeplab.distributed.session import TrainingSession
from dist_deeplab.evaluation import report
from dist_deeplab.evaluation.confusion import scores
from dist_deeplab.evaluation.crf import open_crf
from dist_deeplab.evaluation.evaluator import EvaluationStopped, Loading, evaluate
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.logs import format_count, format_duration
from dist_deeplab.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """What a run is scored on, how, by which ranks, and where the scores go."""

    val_set: Manifest
    config: RunConfig
    session: TrainingSession
    tracker: Tracker


def score(validation: Validation, predictor: Predictor, *, step: int) -> float | None:
    """The mIoU (0..1) on all of the set, recorded and reported; every rank calls it.

    None where a rank was asked to stop meanwhile: then nothing was recorded.
    """
    config, val_set, tracker = validation.config, validation.val_set, validation.tracker
    log.info("evaluating at step %d, on %s", step, format_count(val_set.num_samples, "image"))
    started = time.perf_counter()
    if config.model.batch_norm == "local":
        share_buffers(predictor.net)
    try:
        with open_crf(config.eval.crf, config.crf, ranks_on_host=ranks_on_host()) as crf:
            evaluation = evaluate(
                predictor,
                val_set,
                validation.session,
                loading=Loading(config.data.num_workers, config.eval.batch_size),
                num_panels=config.eval.num_panels,
                crf=crf,
            )
    except EvaluationStopped:
        return None
    result, names = scores(evaluation.confusion), val_set.class_names
    validation.session.meter.evaluation_s = seconds = time.perf_counter() - started
    tracker.log(step, report.metric_values(result, names) | {"time/eval_s": seconds})
    scored = report.Report(evaluation, names)
    folder = config.run_dir / "eval" / f"step_{step:08d}"
    tracker.log_files(step, lambda: report.write_numbers(scored, folder))
    # Drawn beside the next steps: the other ranks would wait for the main one.
    tracker.log_files(step, lambda: report.write_figures(scored, folder), in_background=True)
    tracker.log_images(step, lambda: report.write_series(scored, folder), in_background=True)
    text = report.describe(result, names, per_class=config.eval.table == "classes")
    images = format_count(evaluation.num_images, "image")
    log.info("evaluation at step %d: %s in %s, %s", step, images, format_duration(seconds), text)
    return result.miou
