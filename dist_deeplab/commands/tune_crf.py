"""Find the dense CRF's parameters on a subset of images by trying a grid, as the paper did.

    dist-deeplab tune-crf runs/voc_resnet101/checkpoints/best.pt --data data/voc/val.json
    ... --num-images 100 --grid crf.bi_w=3:6:1 crf.bi_xy_std=30:100:10 crf.bi_rgb_std=3:6:1 eval.scales=[0.5,0.75,1.0]

DeepLab-v2 fixes pos_w = 3 and pos_xy_std = 3 (VOC's final ones: 3 and 1) and searches the other three on 100 images,
coarse to fine. The network runs once an image; the CRF runs in processes beside it, once for each point of the grid,
about a second each for a VOC image. Prints the points, best first, and the best one as overrides for evaluate.
Exit codes: 0 done, 1 error, 2 wrong arguments.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_deeplab.checkpointing.checkpoint import Checkpoint, read_checkpoint
from dist_deeplab.command_line import command_name
from dist_deeplab.config import CrfConfig, RunConfig, load_config
from dist_deeplab.data.loader import EvalDataset
from dist_deeplab.data.shards.cache import build_cache
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.distributed.process_group import DistEnv
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.evaluation.confusion import count_pixels, scores
from dist_deeplab.evaluation.crf import open_crf, require_crf
from dist_deeplab.evaluation.evaluator import content_of
from dist_deeplab.evaluation.inference import Predictor, inference_settings
from dist_deeplab.evaluation.prediction import probabilities_of_one
from dist_deeplab.files import prepare_file
from dist_deeplab.logs import format_count

DEFAULT_GRID = ("crf.bi_w=3,4,5", "crf.bi_xy_std=50,67,80", "crf.bi_rgb_std=3,5")
SHOWN = 20
_NO_AXIS = "crf.num_workers="  # no parameter of a CRF, wherever it stands

Point = dict[str, float]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    require_crf()
    grid = parse_grid(arguments.grid or DEFAULT_GRID)
    checkpoint = read_checkpoint(arguments.checkpoint)
    settings = inference_settings(checkpoint, arguments.overrides)
    manifest = load_manifest(arguments.data, cache=build_cache(settings.data.cache_dir, settings.data.cache_gib))
    if tuple(manifest.class_names) != checkpoint.class_names:
        raise UserError(f"{arguments.checkpoint} and {manifest.path} name other classes")
    if arguments.json:
        prepare_file(arguments.json, remedy="choose another --json")
    points = [base_point(settings) | point for point in grid]
    images = format_count(min(arguments.num_images, manifest.num_samples), "image")
    print(f"{format_count(len(points), 'point')} on {images} of {manifest.path}")
    mious, without = search(checkpoint, settings, manifest, points, num_images=arguments.num_images)
    order = sorted(range(len(points)), key=lambda number: -mious[number])
    show([(grid[number], mious[number]) for number in order], without)
    best = grid[order[0]]
    print("best: " + " ".join(f"crf.{key}={value:g}" for key, value in best.items()))
    if arguments.json:
        rows = [points[number] | {"mIoU": mious[number]} for number in order]
        content = {"mIoU_without_crf": without, "points": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("tune-crf"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .pt file with its .json beside it")
    parser.add_argument("--data", required=True, metavar="MANIFEST", help="shards to tune on, or a URL of them")
    parser.add_argument("--num-images", type=int, default=100, metavar="N", help="evenly spread; default: 100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument(
        "--grid",
        nargs="+",
        metavar="crf.KEY=VALUES",
        help=f"a,b,c or start:stop:step; default: {' '.join(DEFAULT_GRID)}",
    )
    arguments, rest = parser.parse_known_args(argv)
    given = [*rest, *(arguments.grid or [])]
    unknown = [text for text in given if text.startswith("-") or "=" not in text]
    if unknown or arguments.num_images < 1:
        parser.error(f"unknown argument {unknown[0]}" if unknown else "--num-images must be 1 or more")
    grid = [text for text in arguments.grid or [] if text.startswith("crf.") and not text.startswith(_NO_AXIS)]
    arguments.overrides = [text for text in given if text in rest or text not in grid]
    arguments.grid = grid
    return arguments


def parse_grid(texts: Sequence[str]) -> list[Point]:
    """The points of `crf.bi_w=3,4 crf.bi_xy_std=50:70:10`: every combination; a range holds its end.

    Raises:
        UserError: no such key, no numbers, or a value that is out of range.
    """
    axes: dict[str, list[float]] = {}
    for text in texts:
        key, _, values = text.removeprefix("crf.").partition("=")
        try:
            if ":" in values:
                start, stop, step = (float(value) for value in values.split(":"))
                axes[key] = [float(value) for value in np.arange(start, stop + step / 1e6, step)]
            else:
                axes[key] = [float(value) for value in values.split(",")]
        except (ValueError, ZeroDivisionError):
            raise UserError(f"cannot read {text!r}: write crf.KEY=a,b,c or crf.KEY=start:stop:step") from None
        if not axes[key]:
            raise UserError(f"{text!r} holds no value")
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    for point in points:
        load_config(None, [f"crf.{key}={value:g}" for key, value in point.items()])  # refuses what can't be
    return [{key: int(value) if key == "iterations" else value for key, value in point.items()} for point in points]


def base_point(settings: RunConfig) -> Point:
    """The parameters that the grid changes some of."""
    return settings.crf.model_dump(exclude={"num_workers"})


def search(
    checkpoint: Checkpoint, settings: RunConfig, manifest: Manifest, points: Sequence[Point], *, num_images: int
) -> tuple[list[float], float]:
    """The mIoU of each point, and the one without a CRF."""
    device = DistEnv().device
    predictor = Predictor.from_checkpoint(checkpoint, settings, device)
    dataset = EvalDataset(manifest, num_classes=manifest.num_classes, ignore_label=manifest.ignore_label)
    count = min(num_images, manifest.num_samples)
    indices = np.linspace(0, manifest.num_samples - 1, count).round().astype(int).tolist()
    confusions = np.zeros((len(points) + 1, manifest.num_classes, manifest.num_classes), dtype=np.int64)

    def add(number: int, label: np.ndarray, pred: np.ndarray) -> None:
        counts = count_pixels(
            torch.from_numpy(label)[None],
            torch.from_numpy(pred)[None],
            num_classes=manifest.num_classes,
            ignore_label=manifest.ignore_label,
        )
        confusions[number] += counts[0, 0].numpy()

    def cases() -> Iterator[tuple[tuple[int, np.ndarray], np.ndarray, np.ndarray, Point]]:
        for index in indices:
            image, label = content_of(dataset.fetch(index), 0)
            prob = probabilities_of_one(predictor, image, device)
            add(len(points), label, prob.argmax(0).astype(np.uint8))
            for number, point in enumerate(points):
                yield (number, label), image, prob, point

    console = Console(stderr=True)
    with open_crf(True, CrfConfig(num_workers=settings.crf.num_workers), ranks_on_host=1) as crf:
        assert crf is not None
        total = len(indices) * len(points)
        results = crf.search(cases())
        for (number, label), pred in track(
            results, "searching", total=total, console=console, disable=not console.is_terminal
        ):
            add(number, label, pred)
    *with_crf, without = (scores(confusion).miou for confusion in confusions)
    return with_crf, without


def show(rows: Sequence[tuple[Point, float]], without: float) -> None:
    """Print the best points as a table."""
    table = Table(*(key for key in rows[0][0]), "mIoU", "gain")
    for point, miou in rows[:SHOWN]:
        table.add_row(*(f"{value:g}" for value in point.values()), f"{miou:.4f}", f"{miou - without:+.4f}")
    Console().print(table)
    print(
        f"without a CRF: {without:.4f}"
        + (f"; {format_count(len(rows) - SHOWN, 'more point')}" if len(rows) > SHOWN else "")
    )


if __name__ == "__main__":
    sys.exit(main())
