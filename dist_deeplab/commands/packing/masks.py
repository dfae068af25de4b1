"""Annotations -> a folder of masks to look at, with a list of pairs and class names to pack them by."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab.command_line import command_name
from dist_deeplab.commands.packing.arguments import parser_of
from dist_deeplab.commands.packing.printing import print_note
from dist_deeplab.data import voc
from dist_deeplab.data.folders import describe_left_out, list_folder
from dist_deeplab.data.packing.annotations import AnnotatedImage, class_names_in, draw_mask, read_annotations
from dist_deeplab.data.packing.labels import read_class_names
from dist_deeplab.data.shards.manifest import ShardError
from dist_deeplab.files import prepare_folder, replace_text
from dist_deeplab.logs import format_count

COMMANDS = ("masks",)


def parse_arguments(argv: Sequence[str], *, manual: str) -> argparse.Namespace:
    parser = parser_of(manual, "masks")
    parser.add_argument("annotations", type=Path, metavar="FILE|DIR", help="COCO JSON, CVAT XML, or labelme's folder")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for masks, list.txt and names.txt")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="default: background and all labels, sorted")
    parser.add_argument("--overwrite", action="store_true", help="replace masks that are there already")
    return parser.parse_args(argv[1:])


def run(arguments: argparse.Namespace) -> None:
    """Draw a palette PNG per annotated image; beside them go the list of pairs and the class names."""
    annotated = read_annotations(arguments.annotations)
    names = read_class_names(arguments.class_names) if arguments.class_names else class_names_in(annotated)
    if len(names) < 2:
        raise ShardError(f"{arguments.annotations} holds no object; there would be background alone")
    files = images_by_name(arguments.images)
    paired = [(image, find_image(image, files, arguments.images)) for image in annotated]
    targets = {file: (arguments.out / file.relative_to(arguments.images)).with_suffix(".png") for _, file in paired}
    there = [target for target in targets.values() if target.exists()]
    if there and not arguments.overwrite:
        raise ShardError(
            f"{format_count(len(there), 'mask')} there already, e.g. {there[0]}; --overwrite replaces them"
        )
    prepare_folder(arguments.out, remedy="choose another --out")
    for image, file in paired:
        targets[file].parent.mkdir(parents=True, exist_ok=True)
        voc.save_palette_png(draw_mask(image, names, ignore_label=voc.IGNORE_LABEL), targets[file])
    replace_text(arguments.out / "names.txt", "".join(f"{name}\n" for name in names))
    pairs = sorted((file.resolve(), targets[file].resolve()) for _, file in paired)
    replace_text(arguments.out / "list.txt", "".join(f"{file}\t{mask}\n" for file, mask in pairs))
    known = {file for _, file in paired}
    unlisted = sorted(file for file in files.values() if file not in known)
    print_note(describe_left_out(unlisted, why="images without annotations"))
    out = arguments.out
    held = f"{format_count(len(paired), 'mask')} of {format_count(len(names), 'class', 'classes')}"
    print(f"{held} in {out}: look at them, then pack them by")
    print(f"  {command_name('shards')} --list {out}/list.txt --class-names {out}/names.txt --split train --out DIR")


def images_by_name(folder: Path) -> dict[str, Path]:
    """{path below the folder: file} of all images."""
    if not folder.is_dir():
        raise ShardError(f"there is no folder {folder}")
    return {file.relative_to(folder).as_posix(): file for file in list_folder(folder).images}


def find_image(image: AnnotatedImage, files: dict[str, Path], folder: Path) -> Path:
    """The file of an annotated image: that of its path, or the only one of its name.

    Raises:
        ShardError: none, or several.
    """
    exact = files.get(image.name)
    base = Path(image.name).name
    found = [exact] if exact else [file for file in files.values() if file.name == base]
    if len(found) != 1:
        state = "is not" if not found else "is several times"
        raise ShardError(f"the annotated image {image.name} {state} in {folder}")
    return found[0]
