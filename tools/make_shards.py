"""Pack a segmentation data set into WebDataset shards that dist_deeplab trains on.

From VOC folders (a folder that holds JPEGImages, SegmentationClass and ImageSets):

    python tools/make_shards.py --voc-root VOCdevkit/VOC2012 --split train --out data/voc
    python tools/make_shards.py --voc-root VOCdevkit/VOC2012 --split val --out data/voc

From a list file with one `image label` pair of paths a line (DrSleep's format), with one's own classes:

    python tools/make_shards.py --list my_train.txt --data-root /data/mine --class-names names.txt \\
        --split train --out data/mine

Writes OUT/SPLIT-000000.tar ..., OUT/SPLIT.index.npy and, last, OUT/SPLIT.json, the manifest that `data.train` and
`data.val` name. Every sample is decoded and checked before it is written; a killed run leaves no manifest.
Exit codes: 0 done, 2 wrong arguments or data.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dist_deeplab.data import shard_writer, voc
from dist_deeplab.data.shards import Manifest, ShardError
from dist_deeplab.errors import UserError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--voc-root", type=Path, metavar="DIR", help="folder VOCdevkit/VOC2012")
    source.add_argument("--list", type=Path, metavar="FILE", help="file of `image label` lines")
    parser.add_argument("--data-root", type=Path, default=Path(), metavar="DIR", help="folder of the paths in --list")
    parser.add_argument("--split", required=True, help="name of the set; with --voc-root also of the list to read")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="one class a line; default: VOC's 21")
    parser.add_argument("--ignore-label", type=int, default=voc.IGNORE_LABEL, help="void label (default: 255)")
    parser.add_argument("--samples-per-shard", type=int, default=500, metavar="N", help="default: 500, some 60 MB")
    parser.add_argument("--overwrite", action="store_true", help="replace a set of this name")
    arguments = parser.parse_args(argv)
    if arguments.samples_per_shard < 1:
        parser.error(f"--samples-per-shard must be at least 1, not {arguments.samples_per_shard}")
    if not 0 <= arguments.ignore_label <= 255:
        parser.error(f"--ignore-label must be in 0..255, not {arguments.ignore_label}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", arguments.split):
        parser.error(f"--split must be a plain name of letters, digits, dot, dash and underscore: {arguments.split!r}")
    return arguments


def read_class_names(path: Path | None) -> tuple[str, ...]:
    """Return VOC's names, or the non-blank lines of a file."""
    if path is None:
        return voc.CLASS_NAMES
    if not path.is_file():
        raise ShardError(f"there is no file of class names at {path}; write one name a line, background first")
    names = tuple(line for line in shard_writer.read_lines(path) if line)
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise ShardError(f"{path} must name 2 to 255 classes, each once, background first; it has {len(names)}")
    return names


def with_progress(samples: Iterable[shard_writer.SourceSample]) -> Iterable[shard_writer.SourceSample]:
    """Yield the samples under a progress bar on stderr (silent where that is no terminal)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(list(samples), description="packing")


def print_summary(manifest: Manifest) -> None:
    """Print where the set is and which share of the pixels each class has."""
    total = max(1, sum(manifest.class_pixels))
    table = Table("label", "class", "pixels")
    for label, (name, pixels) in enumerate(zip(manifest.class_names, manifest.class_pixels, strict=True)):
        table.add_row(str(label), name, f"{pixels / total:.2%}" if pixels else "none")
    console = Console()
    console.print(f"{manifest.path}: {manifest.num_samples} samples in {len(manifest.shards)} shards", soft_wrap=True)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        labels = shard_writer.LabelSpace(read_class_names(arguments.class_names), arguments.ignore_label)
        if arguments.voc_root is not None:
            samples = shard_writer.read_voc_list(arguments.voc_root, arguments.split)
        else:
            samples = shard_writer.read_pair_list(arguments.data_root, arguments.list)
        manifest = shard_writer.write_shards(
            samples,
            arguments.out,
            split=arguments.split,
            labels=labels,
            samples_per_shard=arguments.samples_per_shard,
            overwrite=arguments.overwrite,
            progress=with_progress,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = error.filename or arguments.out
        print(f"error: {error.strerror}: {where}; nothing that looks finished was left", file=sys.stderr)
        return 1
    print_summary(manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
