"""Score a folder of predicted masks against a folder of labels: the code that scores training, on files.

    dist-deeplab score PREDICTIONS VOCdevkit/VOC2012/SegmentationClass --list val.txt
    dist-deeplab score PREDICTIONS LABELS --class-names names.txt --json scores.json --out report

Both folders hold <key>.png, 8-bit class indices (greyscale or palette). Without --list every label must have its
prediction. What is missing, of another size, in colour or of an unknown class is refused by name. Exit codes: 0 done,
2 wrong arguments or files.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from dist_deeplab.command_line import command_name
from dist_deeplab.data import voc
from dist_deeplab.data.decode import DecodeError, decode_label
from dist_deeplab.data.packing.text_files import read_lines
from dist_deeplab.errors import UserError
from dist_deeplab.evaluation import report
from dist_deeplab.evaluation.accumulator import NUM_BANDS, band_map
from dist_deeplab.evaluation.confusion import count_pixels, image_mious, scores
from dist_deeplab.evaluation.evaluator import Evaluation, ImageScore
from dist_deeplab.files import prepare_file, prepare_folder


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        names = read_class_names(arguments.class_names)
        if arguments.json:
            prepare_file(arguments.json, remedy="choose another --json")
        if arguments.out:
            prepare_folder(arguments.out, remedy="choose another --out")
        keys = find_keys(arguments.predictions, arguments.labels, arguments.list)
        evaluation = score_files(
            arguments.predictions, arguments.labels, keys, num_classes=len(names), ignore_label=arguments.ignore_label
        )
        print(report.render(report.iou_table(scores(evaluation.confusion), names)))
        if arguments.json:
            content = report.to_json(evaluation, names)
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if arguments.out:
            report.write_report(evaluation, names, arguments.out)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("score"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, metavar="PRED_DIR", help="folder of predicted masks, <key>.png")
    parser.add_argument("labels", type=Path, metavar="GT_DIR", help="folder of labels, <key>.png")
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="score these keys only, one per line, e.g. VOC's val.txt"
    )
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="one class per line; default: VOC's 21")
    parser.add_argument("--ignore-label", type=int, default=voc.IGNORE_LABEL, help="void label (default: 255)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write a report with figures")
    return parser.parse_args(argv)


def read_class_names(path: Path | None) -> tuple[str, ...]:
    """VOC's names, or the non-blank lines of a file."""
    if path is None:
        return voc.CLASS_NAMES
    if not path.is_file():
        raise UserError(f"there is no file of class names at {path}")
    return tuple(line for line in read_lines(path) if line)


def find_keys(predictions: Path, labels: Path, list_file: Path | None) -> list[str]:
    """The keys to score: those of the list, else of all labels; each has both files.

    Raises:
        UserError: a folder or list is not there, nothing to score, or files missing (the first is named).
    """
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    if list_file is None:
        keys = sorted(path.stem for path in labels.glob("*.png"))
    elif list_file.is_file():
        lines = [line for line in read_lines(list_file) if line]
        keys = [line if (labels / f"{line}.png").is_file() else line.split()[0] for line in lines]
    else:
        raise UserError(f"there is no list at {list_file}")
    if not keys:
        raise UserError(f"there is nothing to score: {list_file or labels} names no {'key' if list_file else '*.png'}")
    if len(set(keys)) < len(keys):
        raise UserError(f"{list_file} names a key twice; each image counts once")
    for folder in (labels, predictions):
        missing = [key for key in keys if not (folder / f"{key}.png").is_file()]
        if missing:
            few = " (a --list restricts the scoring to its keys)" if list_file is None else ""
            raise UserError(f"{len(missing)} of {len(keys)} files are missing, e.g. {folder / missing[0]}.png{few}")
    return keys


def score_files(
    predictions: Path, labels: Path, keys: Sequence[str], *, num_classes: int, ignore_label: int
) -> Evaluation:
    """The evaluation of the files.

    Raises:
        UserError: a file that holds no class indices, another size, or an index that is no class; it is named.
    """
    counts = torch.zeros(NUM_BANDS, num_classes, num_classes, dtype=torch.int64)
    images = []
    console = Console(stderr=True)
    for key in track(keys, description="scoring", console=console, disable=not console.is_terminal):
        label = read_mask(labels / f"{key}.png", [*range(num_classes), ignore_label])
        pred = read_mask(predictions / f"{key}.png", range(num_classes))
        if label.shape != pred.shape:
            raise UserError(
                f"{predictions / key}.png is {pred.shape[1]} x {pred.shape[0]} pixels but the label "
                f"{label.shape[1]} x {label.shape[0]}; write predictions at the images' own size"
            )
        own = count_pixels(
            torch.from_numpy(label)[None],
            torch.from_numpy(pred)[None],
            num_classes=num_classes,
            ignore_label=ignore_label,
            band=torch.from_numpy(band_map(label, ignore_label))[None],
            num_bands=NUM_BANDS,
        )
        counts += own[0]
        images.append(ImageScore(key, image_mious(own.sum(1)).item()))
    total = counts.numpy()
    if not total.any():
        raise UserError(f"all labels in {labels} are void ({ignore_label}): there is nothing to score")
    return Evaluation(total.sum(0), len(keys), ignore_label, [], total.cumsum(0)[:-1], tuple(images))


def read_mask(path: Path, allowed: Sequence[int]) -> np.ndarray:
    """The indices in a file, uint8 [H, W]."""
    try:
        mask = decode_label(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from None
    unknown = np.setdiff1d(np.unique(mask), allowed)
    if unknown.size:
        where = "is a class index of no class; see --class-names and --ignore-label"
        raise UserError(f"{path}: {unknown[0]} {where}")
    return mask


if __name__ == "__main__":
    sys.exit(main())
