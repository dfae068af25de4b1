"""Folders -> shards: which samples, which classes; count, show, then pack."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dist_deeplab.commands.packing.arguments import (
    add_decoding_arguments,
    add_label_arguments,
    add_workers,
    check_decoding_arguments,
    check_label_arguments,
    decode_options,
    numbered_names,
    parser_of,
    require_plain_name,
)
from dist_deeplab.commands.packing.printing import print_manifest, print_note, print_statistics, show_progress
from dist_deeplab.data import voc
from dist_deeplab.data.folders import describe_left_out
from dist_deeplab.data.packing import cityscapes, lists, sources
from dist_deeplab.data.packing.label_map import LabelMap, read_label_map
from dist_deeplab.data.packing.label_statistics import count_labels
from dist_deeplab.data.packing.labels import (
    LabelSpace,
    read_class_names,
    refuse_class_named_as_void,
    require_two_classes,
)
from dist_deeplab.data.packing.ordered_map import useful_workers
from dist_deeplab.data.packing.samples import Reading
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.packing.writer import DEFAULT_SAMPLES, PackingOptions, check_samples, write_shards
from dist_deeplab.data.shards.manifest import ShardError
from dist_deeplab.data.windows import Windows
from dist_deeplab.files import prepare_folder
from dist_deeplab.logs import format_count

_NO_LIMIT = 10**9


def parse_arguments(argv: Sequence[str], *, manual: str) -> argparse.Namespace:
    parser = parser_of(manual)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--voc-root", type=Path, metavar="DIR", help="folder VOCdevkit/VOC2012")
    source.add_argument("--images", type=Path, metavar="DIR", help="folder of images; with --masks")
    source.add_argument("--tree", type=Path, metavar="DIR", help="images/SPLIT + annotations/SPLIT and the like")
    source.add_argument("--list", type=Path, metavar="FILE", help="file of `image label` lines")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="folder of the masks of --images")
    parser.add_argument("--image-suffix", metavar="TEXT", help="end of image names, before the ending")
    parser.add_argument("--mask-suffix", metavar="TEXT", help="the same of masks, e.g. _L for 0001_L.png")
    parser.add_argument("--voc-masks", metavar="NAME", help="folder in --voc-root (default: SegmentationClass)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the paths in --list")
    parser.add_argument("--split", required=True, nargs="+", metavar="NAME", help="names of the sets (and VOC's lists)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add_label_arguments(parser)
    parser.add_argument("--label-map", type=Path, metavar="FILE", help="`R G B name` or `LEVEL name` lines")
    add_decoding_arguments(parser)
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="cut larger images into tiles of this side")
    parser.add_argument("--overlap", type=int, metavar="PIXELS", help="by which tiles overlap at least (default: 0)")
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help=f"default: {DEFAULT_SAMPLES}")
    parser.add_argument("--shard-mb", type=float, metavar="MB", help="instead: at most this many MB per shard")
    add_workers(parser)
    parser.add_argument("--dry-run", action="store_true", help="count the masks and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of this name")
    arguments = parser.parse_args(argv)
    for name in arguments.split:
        require_plain_name(parser, name)
    check_label_arguments(parser, arguments)
    check_decoding_arguments(parser, arguments)
    if arguments.tile is None and arguments.overlap is not None:
        parser.error("--overlap is that of tiles; give --tile PIXELS too")
    if (arguments.images is None) != (arguments.masks is None):
        parser.error("--images and --masks go together")
    _refuse_arguments_of_other_sources(parser, arguments)
    if len(arguments.split) > 1 and not (arguments.voc_root or arguments.tree):
        parser.error("several --split need --voc-root or --tree; pack one after the other")
    if len(set(arguments.split)) != len(arguments.split):
        parser.error("a --split is named twice")
    if arguments.samples_per_shard is not None and arguments.samples_per_shard < 1:
        parser.error(f"--samples-per-shard must be at least 1, not {arguments.samples_per_shard}")
    if arguments.shard_mb is not None and not arguments.shard_mb > 0:
        parser.error(f"--shard-mb must be more than 0, not {arguments.shard_mb}")
    return arguments


def _refuse_arguments_of_other_sources(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name, fitting in {
        "image_suffix": ("images", "tree"),
        "mask_suffix": ("images", "tree"),
        "voc_masks": ("voc_root",),
        "data_root": ("list",),
    }.items():
        if getattr(arguments, name) is not None and all(getattr(arguments, source) is None for source in fitting):
            options = " or ".join(f"--{source.replace('_', '-')}" for source in fitting)
            parser.error(f"--{name.replace('_', '-')} goes with {options} only")


def run(arguments: argparse.Namespace) -> None:
    """Pack all splits; the samples of all of them are found and counted before the first is written."""
    tiles = Windows(arguments.tile, arguments.overlap or 0) if arguments.tile is not None else None
    if tiles is not None:
        tiles.require_possible("--tile and --overlap")
    found = {split: find_samples(arguments, split) for split in arguments.split}
    known_names = next((source.class_names for source in found.values() if source.class_names), None)
    labels, label_map = label_space(arguments, known_names)
    for split, source in found.items():
        final = arguments.out / f"{split}.json"
        if final.exists() and not (arguments.overwrite or arguments.dry_run):
            raise ShardError(f"{final} is there already; nothing was written (--overwrite replaces the set)")
        check_samples(source.samples, split=split)
    reading = Reading(label_map, decode_options(arguments), tiles)
    workers = useful_workers(arguments.workers, max(len(source.samples) for source in found.values()))
    for split, source in found.items():
        count(split, source, labels, reading, workers=workers)
    if arguments.dry_run or labels is None:
        return
    prepare_folder(arguments.out, remedy="choose another --out")
    per_shard = arguments.samples_per_shard or (_NO_LIMIT if arguments.shard_mb else DEFAULT_SAMPLES)
    max_bytes = round(arguments.shard_mb * 1e6) if arguments.shard_mb else None
    options = PackingOptions(reading, per_shard, max_bytes, overwrite=arguments.overwrite, workers=workers)
    for split, source in found.items():
        progress = show_progress(f"packing {split}")
        manifest = write_shards(
            source.samples, arguments.out, split=split, labels=labels, options=options, progress=progress
        )
        print_manifest(manifest)


def count(split: str, source: "Source", labels: LabelSpace | None, reading: Reading, *, workers: int) -> None:
    """Count a split's masks and print what they hold.

    Raises:
        ShardError: nobody said what the labels mean; a label is not a class; void holds all but one class.
    """
    statistics = count_labels(
        source.samples,
        label_map=reading.label_map,
        options=reading.options,
        workers=workers,
        progress=show_progress(f"counting {split}"),
    )
    if labels is None:
        raise ShardError(
            f"the masks of {split!r} hold the labels {_ranges(statistics.values())}; name the classes by "
            "--class-names FILE (one per line, the first is label 0) or give --num-classes"
        )
    statistics.require(labels)
    require_two_classes(statistics.pixels, labels, where=f"all masks of {split!r}")
    print_statistics(statistics, labels, title=f"{split}: {format_count(len(source.samples), 'sample')}")
    print_note(describe_left_out(source.left_out, why="not an image, or not of a pair"))


class Source(NamedTuple):
    """A split: its samples, files of its folders that belong to none, and class names where they are known."""

    samples: list[SourceSample]
    left_out: list[Path]
    class_names: tuple[str, ...] | None


def find_samples(arguments: argparse.Namespace, split: str) -> Source:
    """The samples of a split, and the class names where the source is a data set whose names are known."""
    if arguments.voc_root is not None:
        masks = arguments.voc_masks or "SegmentationClass"
        return Source(lists.read_voc_list(arguments.voc_root, split, masks=masks), [], voc.CLASS_NAMES)
    if arguments.list is not None:
        return Source(lists.read_pair_list(arguments.data_root or Path(), arguments.list), [], voc.CLASS_NAMES)
    image_suffix, mask_suffix = arguments.image_suffix, arguments.mask_suffix
    if arguments.images is not None:
        suffixes = {"image_suffix": image_suffix or "", "mask_suffix": mask_suffix or ""}
        return Source(*sources.read_folders(arguments.images, arguments.masks, **suffixes), None)
    found, layout = sources.read_tree(arguments.tree, split, image_suffix=image_suffix, mask_suffix=mask_suffix)
    return Source(*found, cityscapes.CLASS_NAMES if layout.name == "Cityscapes" else None)


def label_space(
    arguments: argparse.Namespace, known_names: tuple[str, ...] | None
) -> tuple[LabelSpace | None, LabelMap | None]:
    """The allowed labels (None where nobody said), and the map of the masks' levels or colours, if any."""
    names: tuple[str, ...] | None = None
    if arguments.class_names is not None:
        names = read_class_names(arguments.class_names)
    elif arguments.num_classes is not None:
        names = numbered_names(arguments.num_classes, arguments.ignore_label)
    label_map = None
    if arguments.label_map is not None:
        label_map, names = read_label_map(arguments.label_map, class_names=names, ignore_label=arguments.ignore_label)
    names = names or known_names
    if names:
        refuse_class_named_as_void(names, arguments.ignore_label)
    return LabelSpace(names, arguments.ignore_label) if names else None, label_map


def _ranges(values: list[int]) -> str:
    """E.g. 0..11, 255 of [0, 1, ..., 11, 255]."""
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][1] == value - 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in parts)
