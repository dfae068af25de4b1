"""Shards that are there: index those made elsewhere, verify a set, show what is in one, add its samples' classes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2

from dist_deeplab.commands.packing.arguments import (
    add_label_arguments,
    add_workers,
    check_label_arguments,
    check_workers,
    numbered_names,
    parser_of,
    require_plain_name,
)
from dist_deeplab.commands.packing.printing import print_manifest, print_repeats, print_set, show_progress, size_of
from dist_deeplab.data.packing.contact_sheet import contact_sheet
from dist_deeplab.data.packing.import_tars import IndexingOptions, add_presence, index_tars
from dist_deeplab.data.packing.labels import LabelSpace, read_class_names, refuse_class_named_as_void
from dist_deeplab.data.packing.ordered_map import useful_workers
from dist_deeplab.data.packing.verify import SampleContent, inspect_set, verify
from dist_deeplab.data.repeat import repeat_factors
from dist_deeplab.data.shards.manifest import ShardError, load_manifest
from dist_deeplab.data.shards.presence import SetContents

COMMANDS = ("index", "verify", "info", "add-classes")
_MAX_PROBLEMS = 50


def parse_arguments(argv: Sequence[str], *, manual: str) -> argparse.Namespace:
    command, rest = argv[0], argv[1:]
    parser = parser_of(manual, command)
    if command == "index":
        parser.add_argument("tars", nargs="+", type=Path, metavar="TAR", help="WebDataset tars, all in one folder")
        parser.add_argument("--split", required=True, metavar="NAME", help="name of the set")
        parser.add_argument("--image", metavar="ENDING", help="what the image is called after the key, e.g. jpg")
        parser.add_argument("--label", metavar="ENDING", help="what the label is called after the key, e.g. seg.png")
        parser.add_argument("--overwrite", action="store_true", help="replace a manifest of this name")
        parser.add_argument("--exif", choices=("refuse", "ignore"), default="refuse", help="images that have one")
        add_label_arguments(parser)
    else:
        parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="the .json beside the shards")
    if command == "info":
        parser.add_argument("--sheet", type=Path, metavar="PNG", help="contact sheet (default: beside the manifest)")
        parser.add_argument("--num-samples", type=int, default=24, metavar="N", help="samples on the sheet")
        parser.add_argument("--repeat-threshold", type=_share, metavar="T", help="show data.repeat_threshold's effect")
    add_workers(parser)
    arguments = parser.parse_args(rest)
    runs = {"index": run_index, "verify": run_verify, "info": run_info, "add-classes": run_add_classes}
    arguments.run = runs[command]
    if command == "index":
        require_plain_name(parser, arguments.split)
        check_label_arguments(parser, arguments)
        if arguments.class_names is None and arguments.num_classes is None:
            parser.error("say what the labels mean by --class-names FILE or --num-classes N")
    check_workers(parser, arguments)
    return arguments


def _share(text: str) -> float:
    """A number from 0 to 1.

    Raises:
        ArgumentTypeError: not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of the images, from 0 to 1")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Run the sub-command."""
    arguments.run(arguments)


def run_index(arguments: argparse.Namespace) -> None:
    """Write index and manifest beside the tars."""
    if arguments.class_names is not None:
        names = read_class_names(arguments.class_names)
    else:
        names = numbered_names(arguments.num_classes, arguments.ignore_label)
    refuse_class_named_as_void(names, arguments.ignore_label)
    labels = LabelSpace(names, arguments.ignore_label)
    options = IndexingOptions(
        image=arguments.image,
        label=arguments.label,
        check_readers=arguments.exif == "refuse",
        overwrite=arguments.overwrite,
        workers=arguments.workers,
    )
    progress = show_progress("decoding")
    print_manifest(index_tars(arguments.tars, split=arguments.split, labels=labels, options=options, progress=progress))


def run_verify(arguments: argparse.Namespace) -> None:
    """Print all problems, or that there are none."""
    manifest = load_manifest(arguments.manifest)
    count = 0
    for problem in verify(
        manifest, workers=useful_workers(arguments.workers, manifest.num_samples), progress=show_progress("verifying")
    ):
        count += 1
        if count <= _MAX_PROBLEMS:
            print(problem)
    if count:
        more = f" ({count - _MAX_PROBLEMS} not shown)" if count > _MAX_PROBLEMS else ""
        raise ShardError(f"{arguments.manifest} is not sound: {count} problems{more}")
    print(f"{arguments.manifest} is sound: {size_of(manifest)}")


def run_add_classes(arguments: argparse.Namespace) -> None:
    """Add the file of which classes each sample contains to a set."""
    manifest = load_manifest(arguments.manifest)
    workers = useful_workers(arguments.workers, manifest.num_samples)
    print_manifest(add_presence(manifest, workers=workers, progress=show_progress("reading")))


def run_info(arguments: argparse.Namespace) -> None:
    """Print what is in the set and write the contact sheet."""
    manifest = load_manifest(arguments.manifest)
    sizes, num_void = [], 0
    contents = SetContents(manifest.num_classes)
    for seen in inspect_set(
        manifest, workers=useful_workers(arguments.workers, manifest.num_samples), progress=show_progress("reading")
    ):
        if not isinstance(seen, SampleContent):
            raise seen
        sizes.append(seen.size)
        contents.add(seen.class_pixels)
        num_void += seen.num_void
    threshold = arguments.repeat_threshold or 0.0
    factors = repeat_factors(contents.presence, num_classes=manifest.num_classes, threshold=threshold)
    print_set(manifest, sizes, factors.images, num_void)
    if threshold:
        print_repeats(manifest, factors, threshold=threshold)
    sheet = contact_sheet(manifest, num_samples=max(1, arguments.num_samples))
    target = arguments.sheet or arguments.manifest.with_name(f"{manifest.split}_sheet.png")
    written = target.suffix.lower() == ".png" and cv2.imwrite(str(target), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    if not written:
        raise ShardError(f"cannot write the contact sheet to {target}; give --sheet FILE.png in a folder that is there")
    print(f"contact sheet: {target}")
