"""Score a folder of predicted masks against a folder of labels: the code that scores training, on files.

    dist-deeplab score PREDICTIONS VOCdevkit/VOC2012/SegmentationClass --list val.txt
    dist-deeplab score PREDICTIONS LABELS --class-names names.txt --json scores.json --out report

Both folders hold a mask of class indices per image, in any lossless format and at any depth; names without endings are
the keys. Without --list every label must have its prediction. What is missing, of another size, in colour or of an
unknown class is refused by name; other files are counted and named. Exit codes: 0 done, 2 wrong arguments or files.
"""

import argparse
import json
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from dist_deeplab.command_line import command_name
from dist_deeplab.data import voc
from dist_deeplab.data.folders import describe_left_out, list_folder
from dist_deeplab.data.image_file import DecodeError
from dist_deeplab.data.packing.label_map import LabelMap, read_label_map
from dist_deeplab.data.packing.labels import (
    LabelSpace,
    count_values,
    decode_mask,
    read_class_names,
    require_two_classes,
)
from dist_deeplab.data.packing.sources import common_suffix, masks_by_stem
from dist_deeplab.data.packing.text_files import read_lines
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.evaluation import report
from dist_deeplab.evaluation.accumulator import NUM_BANDS, band_map
from dist_deeplab.evaluation.confusion import count_pixels, image_mious, scores
from dist_deeplab.evaluation.evaluator import Evaluation, ImageScore
from dist_deeplab.files import prepare_file, prepare_folder
from dist_deeplab.logs import format_count


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    names = read_class_names(arguments.class_names) if arguments.class_names else None
    void = voc.IGNORE_LABEL if arguments.ignore_label is None else arguments.ignore_label
    label_map = None
    if arguments.label_map:
        label_map, names = read_label_map(arguments.label_map, class_names=names, ignore_label=void)
    names = names or voc.CLASS_NAMES
    if arguments.json:
        prepare_file(arguments.json, remedy="choose another --json")
    if arguments.out:
        prepare_folder(arguments.out, remedy="choose another --out")
    pairs = find_pairs(arguments.predictions, arguments.labels, arguments)
    void_is_meant = arguments.ignore_label is not None
    evaluation = score_files(pairs, LabelSpace(names, void), label_map, void_is_meant=void_is_meant)
    print(report.render(report.iou_table(scores(evaluation.confusion), names)))
    scored = report.Report(evaluation, names)
    if arguments.json:
        arguments.json.write_text(json.dumps(scored.to_json(), indent=1) + "\n", encoding="utf-8")
    if arguments.out:
        report.write_report(scored, arguments.out)
    return 0


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
    parser.add_argument("--ignore-label", type=int, metavar="N", help="void label (default: 255)")
    parser.add_argument("--label-map", type=Path, metavar="FILE", help="levels or colours of the labels, as in shards")
    parser.add_argument("--label-suffix", default="", metavar="TEXT", help="end of labels' names, e.g. _L for 1_L.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write a report with figures")
    return parser.parse_args(argv)


def find_pairs(predictions: Path, labels: Path, arguments: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """{key: (prediction, label)} to score: the keys of the list, else all labels; what is left out is printed.

    Raises:
        UserError: a folder or list is not there, nothing to score, or files missing (the first is named).
    """
    by_key = {}
    for folder, suffix in ((labels, arguments.label_suffix), (predictions, "")):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        content = list_folder(folder)
        if not content.images:
            raise UserError(f"there is nothing to score: {folder} holds no masks")
        by_key[folder] = masks_by_stem(folder, content.images, suffix)
        note(describe_left_out(content.others, why="not a mask by its name"))
    keys = sorted(by_key[labels]) if arguments.list is None else listed_keys(arguments.list, by_key[labels])
    for folder, found in by_key.items():
        missing = [key for key in keys if key not in found]
        if missing:
            few = " (a --list restricts the scoring to its keys)" if arguments.list is None else ""
            suffix = common_suffix(list(by_key[predictions]), keys)
            if suffix and folder == predictions:
                few = f"; all labels' names end in {suffix}: give --label-suffix {suffix}"
            files, are = format_count(len(keys), "file"), "is" if len(missing) == 1 else "are"
            raise UserError(f"{len(missing):,} of {files} {are} missing, e.g. {folder / missing[0]}.png{few}")
    unscored = [path for key, path in sorted(by_key[predictions].items()) if key not in set(keys)]
    note(describe_left_out(unscored, why="predictions without a label" if arguments.list is None else "not listed"))
    return {key: (by_key[predictions][key], by_key[labels][key]) for key in keys}


def listed_keys(list_file: Path, known: Container[str]) -> list[str]:
    """The keys in a list, one per line; of a line that is not a label's name the first word.

    Raises:
        UserError: no such list, no key in it, or one twice.
    """
    if not list_file.is_file():
        raise UserError(f"there is no list at {list_file}")
    keys = [line if line in known else line.split()[0] for line in read_lines(list_file) if line]
    if not keys:
        raise UserError(f"there is nothing to score: {list_file} names no key")
    if len(set(keys)) < len(keys):
        raise UserError(f"{list_file} names a key twice; each image counts once")
    return keys


def note(text: str) -> None:
    """Print a note on stderr, if there is one."""
    if text:
        print(f"note: {text}", file=sys.stderr)


def score_files(
    pairs: Mapping[str, tuple[Path, Path]], labels: LabelSpace, label_map: LabelMap | None, *, void_is_meant: bool
) -> Evaluation:
    """The evaluation of {key: (prediction, label)}.

    void_is_meant: labels may be void but for one class; else they are taken for masks of 0 and 255, and refused.

    Raises:
        UserError: a file without class indices, of another size, or with an index that is not a class; it is named.
    """
    num_classes, ignore_label = len(labels.class_names), labels.ignore_label
    values = np.zeros(256, dtype=np.int64)
    counts = torch.zeros(NUM_BANDS, num_classes, num_classes, dtype=torch.int64)
    images = []
    console = Console(stderr=True)
    for key, (pred_file, label_file) in track(
        pairs.items(), description="scoring", console=console, disable=not console.is_terminal
    ):
        label = read_mask(label_file, [*range(num_classes), ignore_label], label_map)
        pred = read_mask(pred_file, range(num_classes))
        values += count_values(label)
        if label.shape != pred.shape:
            raise UserError(
                f"{pred_file} is {pred.shape[1]} x {pred.shape[0]} pixels but the label "
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
    if not void_is_meant:
        require_two_classes(values, labels, where="all labels", remedy=f"; --ignore-label {ignore_label} if not")
    total = counts.numpy()
    if not total.any():
        raise UserError(f"all labels are void ({ignore_label}): there is nothing to score")
    return Evaluation(total.sum(0), len(pairs), ignore_label, [], total.cumsum(0)[:-1], tuple(images))


def read_mask(path: Path, allowed: Sequence[int], label_map: LabelMap | None = None) -> np.ndarray:
    """The indices in a file, uint8 [H, W]."""
    try:
        mask = decode_mask(path.read_bytes(), label_map)
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from None
    unknown = np.setdiff1d(np.flatnonzero(count_values(mask)), allowed)
    if unknown.size:
        where = "is a class index of no class; see --class-names and --ignore-label"
        raise UserError(f"{path}: {unknown[0]} {where}")
    return mask


if __name__ == "__main__":
    sys.exit(main())
