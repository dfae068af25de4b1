"""Arguments that packing and looking share."""

import argparse
import re
from pathlib import Path

from dist_deeplab.command_line import command_name
from dist_deeplab.data import voc
from dist_deeplab.data.image_file import MAX_PIXELS, DecodeOptions
from dist_deeplab.workers import num_cores


def parser_of(manual: str, command: str = "") -> argparse.ArgumentParser:
    """A parser whose help is the tool's manual."""
    prog = f"{command_name('shards')} {command}".strip()
    return argparse.ArgumentParser(prog=prog, description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what labels mean."""
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--class-names", type=Path, metavar="FILE", help="one class per line, the first is label 0")
    names.add_argument("--num-classes", type=int, metavar="N", help="classes without names")
    parser.add_argument("--ignore-label", type=int, default=voc.IGNORE_LABEL, help="void label (default: 255)")


def check_label_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse numbers that no label can have, and fewer than one worker."""
    if not 0 <= arguments.ignore_label <= 255:
        parser.error(f"--ignore-label must be in 0..255, not {arguments.ignore_label}")
    if arguments.num_classes is not None and not 2 <= arguments.num_classes <= 255:
        parser.error(f"--num-classes must be in 2..255, not {arguments.num_classes}")
    check_workers(parser, arguments)


def numbered_names(num_classes: int, ignore_label: int) -> tuple[str, ...]:
    """Names of classes that have none; a label that is void is called so."""
    return tuple("void" if number == ignore_label else f"class_{number}" for number in range(num_classes))


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how image files are decoded."""
    parser.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        default="apply",
        help="ignore: masks were drawn on the stored pixels, not on the image as it is shown (default: apply)",
    )
    limit = MAX_PIXELS / 1e6
    parser.add_argument("--max-megapixels", type=float, metavar="N", default=limit, help=f"default: {limit:.0f}")


def check_decoding_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse sizes that OpenCV, which reads the shards, can't decode."""
    if not 0 < arguments.max_megapixels <= 1000:
        parser.error(f"--max-megapixels must be above 0 and at most 1000, not {arguments.max_megapixels:g}")


def decode_options(arguments: argparse.Namespace) -> DecodeOptions:
    """How image files are decoded."""
    return DecodeOptions(max_pixels=round(arguments.max_megapixels * 1e6), upright=arguments.exif == "apply")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the number of processes."""
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (default: all cores)")


def check_workers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse fewer than one."""
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, not {arguments.workers}")


def require_plain_name(parser: argparse.ArgumentParser, name: str) -> None:
    """Refuse a name of a set that is not a plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        parser.error(f"--split must be a plain name of letters, digits, dot, dash and underscore: {name!r}")
