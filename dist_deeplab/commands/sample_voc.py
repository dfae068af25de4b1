"""Draw a small procedural data set in the VOCdevkit layout: try the whole training with no data and no internet.

    dist-deeplab sample-voc --out data/sample                  # 160 train and 40 val images, seed 0
    dist-deeplab sample-voc --out data/more --num-train 1000 --num-val 200 --seed 1

The result is DIR/VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and ImageSets/Segmentation, as in VOC 2012:
palette masks, void (255) along every object's outline, images of several sizes, 1 in 12 JPEGs greyscale. Seven of
the 20 classes occur (drawing/), each in every split of 7 images or more. 200 images take about 6 s of a core (all
cores share the work) and 3 MB; their short side is 112 to 160 px, small on purpose, for training on a CPU.

The same arguments (and library versions) give the same bytes: image i depends on the seed, i and the class whose turn
it is. DIR/VOCdevkit appears in one rename once complete; its sample.json names the arguments. Where it is there already
and its arguments are the same, nothing is done; any other DIR/VOCdevkit is an error and stays as it is. A killed run
leaves at most a hidden folder DIR/.VOCdevkit-*, which may be deleted.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image

from dist_deeplab.command_line import command_name
from dist_deeplab.commands.drawing.objects import CLASSES
from dist_deeplab.commands.drawing.scenes import draw_scene
from dist_deeplab.data import voc
from dist_deeplab.data.packing.ordered_map import ordered_map, useful_workers
from dist_deeplab.workers import num_cores

VERSION = 1
"""Of the drawings: raise it with every change that changes a file's bytes."""
GREY_EVERY = 12
"""One JPEG in this many has a single channel."""


class Scene(NamedTuple):
    """What to draw, and where to."""

    seed: int
    number: int
    first: str
    image_file: Path
    label_file: Path


def write_scene(scene: Scene) -> None:
    """Draw a scene and write its image and mask."""
    image, label = draw_scene(scene.seed, scene.number, scene.first)
    grey = scene.number % GREY_EVERY == GREY_EVERY - 1
    Image.fromarray(image).convert("L" if grey else "RGB").save(scene.image_file, quality=90)
    voc.save_palette_png(label, scene.label_file)


def write_voc2012(voc2012: Path, num_train: int, num_val: int, seed: int) -> None:
    """Write images, masks and lists to the new folder `voc2012`; in both splits the classes take turns."""
    lists, images, masks = (voc2012 / name for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"))
    for folder in (lists, images, masks):
        folder.mkdir(parents=True)
    ids = [f"sample_{index:06d}" for index in range(num_train + num_val)]
    turns = [index if index < num_train else index - num_train for index in range(len(ids))]
    scenes = [
        Scene(seed, index, list(CLASSES)[turn % len(CLASSES)], images / f"{image_id}.jpg", masks / f"{image_id}.png")
        for index, (image_id, turn) in enumerate(zip(ids, turns, strict=True))
    ]
    for _ in ordered_map(write_scene, scenes, workers=useful_workers(num_cores(), len(scenes))):
        pass
    for split, members in (("train", ids[:num_train]), ("val", ids[num_train:]), ("trainval", ids)):
        (lists / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in members))


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument gets one line, not the usage too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows the usage)\n")


def main(argv: list[str] | None = None) -> int:
    """Make the data set and return 0; exit with 2 and one sentence on stderr where that can't be done."""
    parser = Parser(
        prog=command_name("sample-voc"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make VOCdevkit in")
    parser.add_argument("--num-train", type=int, default=160, metavar="N", help="images of the train split (160)")
    parser.add_argument("--num-val", type=int, default=40, metavar="N", help="images of the val split (40)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws other images (0)")
    args = parser.parse_args(argv)
    wanted = {"num_train": args.num_train, "num_val": args.num_val, "seed": args.seed}
    for name, value in wanted.items():
        if value < (least := 0 if name == "seed" else 1):
            parser.error(f"--{name.replace('_', '-')} {value} is too small: give {least} or more")
    marker = json.dumps({"tool": "make_sample_voc", "version": VERSION, **wanted}) + "\n"
    target: Path = args.out / "VOCdevkit"
    try:
        if target.exists():
            if (target / "sample.json").is_file() and (target / "sample.json").read_bytes() == marker.encode():
                print(f"{target} is there already, complete and made with these arguments: nothing to do")
                return 0
            parser.error(f"{target} is there and was not made with these arguments: choose another --out or remove it")
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".VOCdevkit-", dir=args.out) as scratch:
            unfinished = Path(scratch) / "VOCdevkit"
            write_voc2012(unfinished / "VOC2012", **wanted)
            (unfinished / "sample.json").write_text(marker)
            unfinished.rename(target)
    except OSError as error:
        parser.error(f"cannot write {target} ({error.strerror or error}): choose an --out that you can write to")
    print(f"{target}: {args.num_train} train and {args.num_val} val images of {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
