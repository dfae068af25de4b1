"""Where samples lie before they are packed: VOC folders, lists of pairs, folders of images and masks, known trees."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dist_deeplab.data.packing.labels import read_lines
from dist_deeplab.data.shards.manifest import ShardError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
_SAME_SPLIT = {"train": "training", "training": "train", "val": "validation", "validation": "val"}


@dataclass(frozen=True)
class SourceSample:
    """A sample still lying in folders."""

    key: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Layout:
    """Where a known kind of tree keeps a split: folders with `{split}`, and endings of the file names."""

    name: str
    images: str
    masks: str
    image_suffix: str = ""
    mask_suffix: str = ""


LAYOUTS = (
    Layout("Cityscapes", "leftImg8bit/{split}", "gtFine/{split}", "_leftImg8bit", "_gtFine_labelTrainIds"),
    Layout("mmsegmentation (ADE20K)", "images/{split}", "annotations/{split}"),
    Layout("mmsegmentation", "img_dir/{split}", "ann_dir/{split}"),
    Layout("images and masks", "images/{split}", "masks/{split}"),
    Layout("images and labels", "images/{split}", "labels/{split}"),
    Layout("one folder a split", "{split}/images", "{split}/masks"),
    Layout("one folder a split", "{split}/images", "{split}/labels"),
    Layout("CamVid (SegNet)", "{split}", "{split}annot"),
    Layout("CamVid", "{split}", "{split}_labels", "", "_L"),
)
"""The first whose folders are there is taken. The Cityscapes and mmsegmentation layouts are those that their own
documentation describes."""


def read_voc_list(voc_root: Path, split: str, *, masks: str = "SegmentationClass") -> list[SourceSample]:
    """The samples of `ImageSets/Segmentation/<split>.txt` in a VOCdevkit/VOC2012 folder.

    Args:
        voc_root: the folder that holds JPEGImages.
        split: name of the list.
        masks: folder of the masks; SegmentationClassAug for train_aug.

    Raises:
        ShardError: no such folder or list.
    """
    listing = voc_root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not voc_root.is_dir():
        raise ShardError(f"there is no folder {voc_root}; give the one that holds JPEGImages, e.g. VOCdevkit/VOC2012")
    if not listing.is_file():
        there = ", ".join(sorted(file.stem for file in listing.parent.glob("*.txt"))) or "none"
        raise ShardError(f"there is no list {listing}; lists there: {there}")
    return [
        SourceSample(key, voc_root / "JPEGImages" / f"{key}.jpg", voc_root / masks / f"{key}.png")
        for key in read_lines(listing)
        if key
    ]


def read_pair_list(data_root: Path, listing: Path) -> list[SourceSample]:
    """The samples of a file with one `image label` pair of paths per line, under `data_root` (DrSleep's format).

    Blank lines and CRLF are tolerated; a leading slash means `data_root`, as there. The key is the image's file name
    without its ending.

    Raises:
        ShardError: no such file, or a line that is not a pair.
    """
    if not listing.is_file():
        raise ShardError(f"there is no list file {listing}")
    samples = []
    for number, line in enumerate(read_lines(listing), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise ShardError(f"line {number} of {listing} is not an `image label` pair: {line.strip()!r}")
        image, label = (data_root / part.lstrip("/") for part in parts)
        samples.append(SourceSample(image.stem, image, label))
    return samples


def read_folders(images: Path, masks: Path, *, image_suffix: str = "", mask_suffix: str = "") -> list[SourceSample]:
    """The samples of a folder of images and a folder of masks, sub-folders included, sorted by key.

    A mask belongs to the image of the same path without `image_suffix`, `mask_suffix` and endings. Characters that a
    key may not hold become underscores.

    Raises:
        ShardError: a folder is missing or holds no images; an image has no mask or two; two images get one key. Masks
            without an image are left alone: they may be of another split.
    """
    found = _stems(images, IMAGE_ENDINGS, image_suffix)
    stems = {stem for stem, _ in found}
    by_stem: dict[str, Path] = {}
    for stem, mask in _stems(masks, MASK_ENDINGS, mask_suffix):
        if stem in by_stem and stem in stems:
            raise ShardError(
                f"two masks fit one image: {by_stem[stem]} and {mask}; give --mask-suffix, or move one away"
            )
        by_stem[stem] = mask
    missing = [(stem, path) for stem, path in found if stem not in by_stem]
    if missing:
        stem, image = missing[0]
        raise ShardError(
            f"{len(missing)} of {len(found)} images in {images} have no mask in {masks}, e.g. {image.name} (expected "
            f"{stem}{mask_suffix}.png); if their names end differently, give --image-suffix or --mask-suffix"
        )
    samples: dict[str, SourceSample] = {}
    for stem, image in found:
        key = re.sub(r"[^\w-]", "_", stem)
        if key in samples:
            raise ShardError(f"{samples[key].image} and {image} would both get the key {key!r}; rename one")
        samples[key] = SourceSample(key, image, by_stem[stem])
    return [samples[key] for key in sorted(samples)]


def read_tree(
    root: Path, split: str, *, image_suffix: str | None = None, mask_suffix: str | None = None
) -> tuple[list[SourceSample], Layout]:
    """The samples of a split in a tree of a known layout, and which layout it is.

    Suffixes take the place of the layout's own.

    Raises:
        ShardError: no layout fits, or see `read_folders`.
    """
    if not root.is_dir():
        raise ShardError(f"there is no folder {root}")
    for layout in LAYOUTS:
        for name in (split, _SAME_SPLIT.get(split, split)):
            images, masks = (root / folder.format(split=name) for folder in (layout.images, layout.masks))
            if images.is_dir() and masks.is_dir():
                samples = read_folders(
                    images,
                    masks,
                    image_suffix=layout.image_suffix if image_suffix is None else image_suffix,
                    mask_suffix=layout.mask_suffix if mask_suffix is None else mask_suffix,
                )
                return samples, layout
    known = "; ".join(f"{layout.images} + {layout.masks}" for layout in LAYOUTS)
    raise ShardError(f"{root} has no split {split!r} in a known layout ({known}); give --images and --masks")


def _stems(folder: Path, endings: Iterable[str], suffix: str) -> list[tuple[str, Path]]:
    """(path under `folder` without suffix and ending, path) of all images whose name ends in `suffix`."""
    if not folder.is_dir():
        raise ShardError(f"there is no folder {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    found = [
        (_stem(path, folder, suffix), path) for path in files if path.stem.endswith(suffix) and path.stem != suffix
    ]
    if not found:
        what = f" named *{suffix}.*" if suffix else ""
        raise ShardError(f"{folder} holds no images{what} ({len(files)} files with the endings {', '.join(endings)})")
    return found


def _stem(path: Path, folder: Path, suffix: str) -> str:
    relative = path.relative_to(folder)
    return str(relative.with_name(relative.stem.removesuffix(suffix)))
