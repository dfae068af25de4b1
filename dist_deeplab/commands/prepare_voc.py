"""From nothing to shards of VOC 2012: train, val, trainval and train_aug (10,582 images), ready for training.

    dist-deeplab prepare-voc --out data/voc

Downloads VOC 2012 (2.0 GB) and SBD (1.4 GB), verifies them, converts SBD's labels, and packs all sets; needs some 9 GB.
Killed at any moment, the same command resumes where it was. With --voc-only SBD, and so train_aug, is left out.

Archives that are here already, or mirrors (tried in this order, before the official places):

    dist-deeplab prepare-voc --out data/voc --voc-archive VOCtrainval_11-May-2012.tar --sbd-archive benchmark.tgz
    dist-deeplab prepare-voc --out data/voc --voc-archive https://mirror.example/VOCtrainval_11-May-2012.tar

Checksums: neither data set's owners publish one; those checked are the MD5s that torchvision carries. --voc-md5 and
--sbd-md5 give others, `none` checks nothing; only with the official archives is the number of images checked too.

Writes OUT/archives, OUT/VOCdevkit/VOC2012, OUT/SBD and OUT/{train,val,trainval,train_aug}.json with their shards.
VOC's terms (Flickr images, research use) apply. Exit codes: 0 done, 1 disk trouble, 2 wrong arguments or data.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from dist_deeplab.command_line import command_name
from dist_deeplab.commands.packing.arguments import add_workers, check_workers
from dist_deeplab.commands.packing.printing import print_manifest, show_progress
from dist_deeplab.data import voc
from dist_deeplab.data.packing import voc_download
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.lists import read_voc_list
from dist_deeplab.data.packing.ordered_map import useful_workers
from dist_deeplab.data.packing.voc_download import Archive
from dist_deeplab.data.packing.writer import PackingOptions, write_shards
from dist_deeplab.data.shards.manifest import ShardError, load_manifest
from dist_deeplab.downloads import Progress
from dist_deeplab.errors import UserError, one_line_errors
from dist_deeplab.files import prepare_folder
from dist_deeplab.logs import format_count


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("prepare-voc"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for everything")
    for name, archive in (("voc", voc_download.VOC2012), ("sbd", voc_download.SBD)):
        help_text = f"{archive.name}: a file or a mirror's URL; may be repeated"
        parser.add_argument(f"--{name}-archive", action="append", default=[], metavar="FILE|URL", help=help_text)
        parser.add_argument(f"--{name}-md5", metavar="MD5", help="of another archive than the official one, or none")
    parser.add_argument("--voc-only", action="store_true", help="without SBD, so without train_aug")
    add_workers(parser)
    arguments = parser.parse_args(argv)
    check_workers(parser, arguments)
    return arguments


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        prepare(arguments)
    except OSError as error:
        where = error.filename or arguments.out
        print(f"error: {error.strerror}: {where}; the same command resumes from here", file=sys.stderr)
        return 1
    return 0


def prepare(arguments: argparse.Namespace) -> None:
    """Do all steps that are not done yet."""
    out = arguments.out
    if arguments.voc_only and (arguments.sbd_archive or arguments.sbd_md5):
        raise UserError("--voc-only leaves SBD out, --sbd-archive and --sbd-md5 are about it; drop one of the two")
    for name in ("voc", "sbd"):
        sources, md5 = (getattr(arguments, f"{name}_{what}") for what in ("archive", "md5"))
        if md5 and not sources:
            raise UserError(
                f"--{name}-md5 is a checksum of another archive than the official; name it by --{name}-archive"
            )
    prepare_folder(out, remedy="choose another --out")
    # 1. Archives
    path = fetch_archive(chosen(voc_download.VOC2012, arguments.voc_archive, arguments.voc_md5), out)
    root = voc_download.unpack(
        path, out / "VOCdevkit" / "VOC2012", inside="VOCdevkit/VOC2012", parts=voc_download.VOC_PARTS
    )
    splits = {"train": "SegmentationClass", "val": "SegmentationClass", "trainval": "SegmentationClass"}
    # 2. SBD's labels
    if not arguments.voc_only:
        path = fetch_archive(chosen(voc_download.SBD, arguments.sbd_archive, arguments.sbd_md5), out)
        sbd = voc_download.unpack(path, out / "SBD", inside="benchmark_RELEASE/dataset", parts=voc_download.SBD_PARTS)
        if not (out / "train_aug.json").exists():
            voc_download.augment(root, sbd, workers=arguments.workers, progress=show_progress("converting SBD"))
        splits["train_aug"] = voc_download.AUG_MASKS
    # 3. Shards
    official = arguments.voc_md5 is None and arguments.sbd_md5 is None
    for split, masks in splits.items():
        pack(root, out, split, masks, check_count=official, workers=arguments.workers)
    best = "train" if arguments.voc_only else "train_aug"
    print(f"train with: data.train={out / best}.json data.val={out / 'val.json'}")


def chosen(archive: Archive, sources: Sequence[str], md5: str | None) -> Archive:
    """The archive with the user's sources before the official ones, and the user's checksum if there is one."""
    if md5 is not None:  # another archive: the official places have not got it
        return dataclasses.replace(archive, sources=tuple(sources), md5="" if md5 == "none" else md5.lower())
    return dataclasses.replace(archive, sources=(*sources, *archive.sources))


def fetch_archive(archive: Archive, out: Path) -> Path:
    """The verified archive, with a progress bar while it comes."""
    with download_bar(archive.name) as progress:
        return voc_download.get_archive(archive, out / "archives", progress=progress)


def pack(root: Path, out: Path, split: str, masks: str, *, check_count: bool, workers: int) -> None:
    """Write a set's shards unless they are there."""
    final = out / f"{split}.json"
    if final.exists():
        print_manifest(load_manifest(final))
        return
    samples = read_voc_list(root, split, masks=masks)
    expected = voc.SPLIT_SIZES[split]
    if check_count and len(samples) != expected:
        found = format_count(len(samples), "image")
        raise ShardError(f"the list {split} names {found}, not {expected:,}; delete {root} and start again")
    manifest = write_shards(
        samples,
        out,
        split=split,
        labels=LabelSpace(voc.CLASS_NAMES, voc.IGNORE_LABEL),
        options=PackingOptions(workers=useful_workers(workers, len(samples))),
        progress=show_progress(f"packing {split}"),
    )
    print_manifest(manifest)


@contextmanager
def download_bar(name: str) -> Iterator[Progress]:
    """Yield what shows bytes on stderr (silent where that is not a terminal)."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with ProgressBar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
