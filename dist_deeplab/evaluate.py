"""Score a checkpoint on a validation set: per-class IoU, each image once at its own size.

    python -m dist_deeplab.evaluate runs/voc_resnet101/checkpoints/best.pt --data data/voc/val.json
    torchrun --nproc_per_node 8 -m dist_deeplab.evaluate CHECKPOINT --data MANIFEST --json scores.json

The checkpoint says which network and preprocessing it is of; nothing has to be repeated. Prints the table and writes
metrics.json, confusion.png, iou.png and panels.png to --out (default: eval/<checkpoint>_<set> in the run's folder).
Exit codes: 0 done, 1 error, 2 wrong arguments, checkpoint or data.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_deeplab import config as configuration
from dist_deeplab.data.shards import Manifest, load_manifest
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation import report
from dist_deeplab.evaluation.confusion import scores
from dist_deeplab.evaluation.evaluator import Evaluation, evaluate
from dist_deeplab.evaluation.inference import load_network
from dist_deeplab.model.weights import Variant
from dist_deeplab.runtime.distributed import DistEnv, exit_with_crash, exit_with_error, leave, process_group
from dist_deeplab.runtime.logs import setup_logging
from dist_deeplab.runtime.parallel import place_model
from dist_deeplab.training.resume import read_checkpoint

log = logging.getLogger("dist_deeplab.evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    env = DistEnv()
    try:
        env = DistEnv.from_environ()
        manifest = load_manifest(arguments.data)
        saved = read_checkpoint(arguments.checkpoint)
        settings = run_settings(saved, arguments.overrides)
        if manifest.num_classes != settings.data.num_classes:
            raise UserError(
                f"{arguments.checkpoint} knows {settings.data.num_classes} classes but {manifest.path} has "
                f"{manifest.num_classes}; give the checkpoint or the set that fits the other"
            )
        prepare_output(arguments)
        with process_group(env):
            score(env, saved, settings, manifest, arguments)
        return 0
    except UserError as error:
        return exit_with_error(env, error)
    except Exception as error:
        return exit_with_crash(env, error)


def score(
    env: DistEnv,
    saved: dict[str, Any],
    settings: configuration.RunConfig,
    manifest: Manifest,
    arguments: argparse.Namespace,
) -> None:
    """Evaluate, print the table and write the report; every rank calls it."""
    setup_logging(is_main=env.is_main, rank=env.rank, folder=None)
    variant = Variant.from_plain(saved["variant"])
    evaluation = evaluate(
        place_model(load_network(saved), env.device),
        manifest,
        env,
        preprocessing=variant.preprocessing,
        num_workers=settings.data.num_workers,
        num_panels=settings.eval.num_panels,
    )
    names = manifest.class_names
    table = report.render(report.iou_table(scores(evaluation.confusion), names))
    source = f"{arguments.checkpoint}, step {saved['step']}"
    log.info("%s, on %d images of %s\n%s", source, evaluation.num_images, manifest.path, table)
    env.on_main(write, evaluation, names, arguments)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dist_deeplab.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file with its .json beside it")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="MANIFEST", help="manifest of the shards to score on"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="data.num_workers or eval.num_panels, the run's own else",
    )
    return parser.parse_intermixed_args(argv)


def report_folder(arguments: argparse.Namespace) -> Path:
    """Return --out, or its default beside the checkpoints."""
    checkpoint: Path = arguments.checkpoint
    default = checkpoint.parent.parent / "eval" / f"{checkpoint.stem}_{arguments.data.stem}"
    return arguments.out or default


def prepare_output(arguments: argparse.Namespace) -> None:
    """Make the folders that will be written to, before the work.

    Raises:
        UserError: they can't be made.
    """
    for folder in (report_folder(arguments), *([arguments.json.parent] if arguments.json else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out or --json") from None


def run_settings(saved: dict[str, Any], overrides: Sequence[str]) -> configuration.RunConfig:
    """Return the configuration of the checkpoint's run, with overrides of what does not belong to its weights.

    Raises:
        UserError: an override that evaluation would ignore.
    """
    for override in overrides:
        if not override.startswith(("data.num_workers=", "eval.num_panels=")):
            raise UserError(
                f"{override!r} has no meaning here: the checkpoint fixes all but data.num_workers and eval.num_panels"
            )
    return configuration.load_config(None, overrides, base=saved["config"])


def write(evaluation: Evaluation, class_names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Write the report's folder and, where wanted, the JSON file."""
    folder = report_folder(arguments)
    report.write_report(evaluation, class_names, folder)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(report.to_json(evaluation, class_names), indent=1) + "\n", encoding="utf-8"
        )
    log.info("report in %s", folder)


if __name__ == "__main__":
    leave(main())
