"""Score a checkpoint on a validation set: per-class IoU, each image once at its own size.

    python -m dist_deeplab.evaluate runs/voc_resnet101/checkpoints/best.pt --data data/voc/val.json
    torchrun --nproc_per_node 8 -m dist_deeplab.evaluate CHECKPOINT --data MANIFEST --json scores.json
    ... eval.scales=[0.5,0.75,1.0] eval.flip=true eval.crf=true        # as the paper's best row

The checkpoint says which network and preprocessing it is of; nothing has to be repeated. Prints the table and writes
metrics.json, classes.csv, images.csv, confusion.png, iou.png, trimap.png and panels of images spread over the set, of
the best and the worst ones to --out (default: eval/<checkpoint>_<set>... in the run's folder). A warning says how many
of the images the checkpoint was trained on. Where the checkpoint lies in its run's folder, scores and report go to the
run's journal and MLflow page too, as eval/<set>.../*. Exit codes: 0 done, 1 error, 2 wrong arguments, checkpoint or
data.
"""

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab import config as configuration
from dist_deeplab.checkpointing.checkpoint import Checkpoint, load_checkpoint
from dist_deeplab.command_line import command_name
from dist_deeplab.data.shards.cache import build_cache
from dist_deeplab.data.shards.checks import require_scorable
from dist_deeplab.data.shards.manifest import Manifest, check_sizes, load_manifest
from dist_deeplab.distributed.launcher import hard_exit, run_command
from dist_deeplab.distributed.process_group import DistEnv, ranks_on_host
from dist_deeplab.distributed.session import Session, session
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation import report
from dist_deeplab.evaluation.confusion import scores
from dist_deeplab.evaluation.contamination import find_contamination
from dist_deeplab.evaluation.crf import open_crf, require_crf
from dist_deeplab.evaluation.evaluator import Evaluation, Loading, draw_panels, evaluate
from dist_deeplab.evaluation.inference import Predictor, inference_name, inference_settings
from dist_deeplab.files import prepare_file, prepare_folder
from dist_deeplab.logs import format_count
from dist_deeplab.redaction import shown_url
from dist_deeplab.tracking.post_training import add_to_run

log = logging.getLogger("dist_deeplab.evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return run_command(lambda env: command(arguments, env))


def command(arguments: argparse.Namespace, env: DistEnv) -> int:
    """Check all that can be checked before any heavy work, then score; the exit code."""
    with session(env) as ranks:
        checkpoint = load_checkpoint(env, arguments.checkpoint)
        settings = inference_settings(checkpoint, arguments.overrides)
        cache = build_cache(settings.data.cache_dir, settings.data.cache_gib)
        manifest = load_manifest(arguments.data, cache=cache, check_shards=False)
        env.on_each_node(check_sizes, manifest)
        require_crf(settings.eval.crf)
        check_classes(checkpoint, manifest)
        require_scorable(manifest)
        prepare_folder(report_folder(arguments, settings), remedy="choose another --out")
        if arguments.json:
            prepare_file(arguments.json, remedy="choose another --json")
        score(ranks, checkpoint, settings, manifest, arguments)
    return 0


def score(
    ranks: Session,
    checkpoint: Checkpoint,
    settings: configuration.RunConfig,
    manifest: Manifest,
    arguments: argparse.Namespace,
) -> None:
    """Evaluate, print the table and write the report; every rank calls it."""
    env = ranks.env
    overlap = env.on_main(find_contamination, checkpoint, manifest)
    notes = [str(overlap)] if overlap and overlap.num_images else []
    if checkpoint.variant.note:
        notes.append(f"NOTE on these weights: {checkpoint.variant.note}")
    for note in notes:
        log.warning("%s", note)
    predictor = Predictor.from_checkpoint(checkpoint, settings, env.device)
    num_panels, loading = settings.eval.num_panels, Loading(settings.data.num_workers, settings.eval.batch_size)
    with open_crf(settings.eval.crf, settings.crf, ranks_on_host=ranks_on_host()) as crf:
        evaluation = evaluate(predictor, manifest, ranks, loading=loading, num_panels=num_panels, crf=crf)
        best, worst = (
            draw_panels(predictor, manifest, env, indices, crf=crf) for indices in extremes(evaluation, num_panels)
        )
    names = manifest.class_names
    per_class = settings.eval.table == "classes"
    text = report.describe(scores(evaluation.confusion), names, per_class=per_class, notes=notes)
    source = f"{checkpoint}, step {checkpoint.step}"
    images = format_count(evaluation.num_images, "image")
    log.info("%s, on %s of %s: %s", source, images, manifest.path, text)
    about = {
        "checkpoint": str(arguments.checkpoint),
        "step": checkpoint.step,
        "data": str(manifest.path),
        "keys_sha256": manifest.keys_sha256,
        "inference": configuration.score_settings(settings),
        "num_images_trained_on": overlap.num_images if overlap else None,
        "notes": notes,
    }
    folder = report_folder(arguments, settings)
    env.on_main(write, report.Report(evaluation, names, about, best, worst), folder, arguments.json)
    if arguments.mlflow:
        group = f"eval/{manifest.split}{inference_name(settings.eval)}"
        values = report.metric_values(scores(evaluation.confusion), names, group=group)
        env.on_main(add_to_run, arguments.checkpoint.parent.parent, checkpoint.step, values, folder)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("evaluate"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file with its .json beside it")
    parser.add_argument(
        "--data", required=True, metavar="MANIFEST", help="manifest of the shards to score on, or a URL of one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--no-mlflow", dest="mlflow", action="store_false", help="leave the run's journal and its MLflow page alone"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="eval.*, crf.* or data.num_workers; the run's own else",
    )
    return parser.parse_intermixed_args(argv)


def report_folder(arguments: argparse.Namespace, settings: configuration.RunConfig) -> Path:
    """`--out`, or its default beside the checkpoints."""
    checkpoint: Path = arguments.checkpoint
    name = f"{checkpoint.stem}_{Path(shown_url(arguments.data)).stem}{inference_name(settings.eval)}"
    return arguments.out or checkpoint.parent.parent / "eval" / name


def check_classes(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """Check that checkpoint and set mean the same by a label.

    Raises:
        UserError: another number of classes, or other names.
    """
    known, labelled = checkpoint.class_names, tuple(manifest.class_names)
    if len(known) != len(labelled):
        raise UserError(
            f"{checkpoint} knows {format_count(len(known), 'class', 'classes')} but {manifest.path} has "
            f"{len(labelled)}; give the checkpoint or the set that fits the other"
        )
    different = [label for label, names in enumerate(zip(known, labelled)) if len(set(names)) > 1]
    if different:
        label = different[0]
        raise UserError(
            f"label {label} is {known[label]!r} to {checkpoint} but {labelled[label]!r} in {manifest.path}; make the "
            "shards with the names, and the order, that the checkpoint was trained with"
        )


def extremes(evaluation: Evaluation, count: int) -> tuple[list[int], list[int]]:
    """The indices of the `count` images with the best scores, best first, and of those with the worst."""
    scored = [index for index, image in enumerate(evaluation.images) if not math.isnan(image.miou)]
    ranked = sorted(scored, key=lambda index: evaluation.images[index].miou)
    return ranked[::-1][:count], ranked[:count]


def write(content: report.Report, folder: Path, json_file: Path | None) -> None:
    """Write the report's folder and, where wanted, its JSON file once more."""
    report.write_report(content, folder)
    if json_file:
        json_file.write_text(json.dumps(content.to_json(), indent=1) + "\n", encoding="utf-8")
    log.info("report in %s", folder)


if __name__ == "__main__":
    hard_exit(main())
