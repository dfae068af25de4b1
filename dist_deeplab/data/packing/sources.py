"""Where samples lie before they are packed: folders of images and masks, and known trees of such folders."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dist_deeplab.data.folders import list_folder
from dist_deeplab.data.shards.manifest import ShardError
from dist_deeplab.logs import format_count

_LOSSY_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".avif", ".avifs", ".jp2", ".j2k", ".jpx")
_SAME_SPLIT = {"train": "training", "training": "train", "val": "validation", "validation": "val"}


@dataclass(frozen=True)
class SourceSample:
    """A sample still lying in folders."""

    key: str
    image: Path
    label: Path


class FoundSamples(NamedTuple):
    """Samples, sorted by key, and the files of their folders that belong to none."""

    samples: list[SourceSample]
    left_out: list[Path]


def key_of(stem: str) -> str:
    """A sample's key for a name without ending: characters that end a key in WebDataset become underscores."""
    return re.sub(r"[^\w-]", "_", stem)


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


def read_folders(images: Path, masks: Path, *, image_suffix: str = "", mask_suffix: str = "") -> FoundSamples:
    """The samples of a folder of images and a folder of masks, sub-folders included, sorted by key.

    A mask belongs to the image of the same path without `image_suffix`, `mask_suffix` and endings; a mask may also
    bear the image's ending (`a.jpg.png`). The two may be one folder if `mask_suffix` tells masks from images, or if
    all images are JPEGs and no mask is.

    Raises:
        ShardError: a folder is missing or holds no images; an image has no mask or two; two images get one key.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ShardError(f"there is no folder {folder}")
    image_files, mask_files, left_out = _tell_apart(images, masks, image_suffix, mask_suffix)
    found = _stems(images, image_files, image_suffix)
    by_stem = masks_by_stem(masks, mask_files, mask_suffix, stems={stem for stem, _ in found})
    samples: dict[str, SourceSample] = {}
    missing = []
    for stem, image in found:
        mask = by_stem.get(stem) or by_stem.get(f"{stem}{image.suffix}")
        key = key_of(stem)
        if mask is None:
            missing.append((stem, image))
        elif key in samples:
            raise ShardError(f"{samples[key].image} and {image} would both get the key {key!r}; rename one")
        else:
            samples[key] = SourceSample(key, image, mask)
    if missing:
        stem, image = missing[0]
        expected, have = f"{stem}{mask_suffix}.png", "has" if len(missing) == 1 else "have"
        raise ShardError(
            f"{len(missing):,} of {format_count(len(found), 'image')} in {images} {have} no mask in {masks}, e.g. "
            f"{image.name} (expected {expected}); "
            f"{_suggest_suffix([s for s, _ in missing], list(by_stem), mask_suffix)}"
        )
    used = {path for sample in samples.values() for path in (sample.image, sample.label)}
    unused = sorted({path for path in (*image_files, *mask_files, *left_out) if path not in used})
    return FoundSamples([samples[key] for key in sorted(samples)], unused)


def read_tree(
    root: Path, split: str, *, image_suffix: str | None = None, mask_suffix: str | None = None
) -> tuple[FoundSamples, Layout]:
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
                found = read_folders(
                    images,
                    masks,
                    image_suffix=layout.image_suffix if image_suffix is None else image_suffix,
                    mask_suffix=layout.mask_suffix if mask_suffix is None else mask_suffix,
                )
                return found, layout
    known = "; ".join(f"{layout.images} + {layout.masks}" for layout in LAYOUTS)
    raise ShardError(f"{root} has no split {split!r} in a known layout ({known}); give --images and --masks")


def _tell_apart(
    images: Path, masks: Path, image_suffix: str, mask_suffix: str
) -> tuple[list[Path], list[Path], list[Path]]:
    """The files that may be images, those that may be masks, and those that are neither, of two folders or one."""
    in_images, in_masks = list_folder(images), list_folder(masks)
    image_files, mask_files = in_images.images, in_masks.images
    shared = set(image_files) & set(mask_files) | {
        file for file in image_files if file.resolve().is_relative_to(masks.resolve())
    }
    if shared and mask_suffix:
        image_files = [file for file in image_files if not file.stem.endswith(mask_suffix)]
    elif shared and image_suffix:
        mask_files = [file for file in mask_files if not file.stem.endswith(image_suffix)]
    elif shared and images.resolve() == masks.resolve():
        image_files = [file for file in image_files if file.suffix.lower() in _LOSSY_ENDINGS]
        mask_files = [file for file in mask_files if file.suffix.lower() not in _LOSSY_ENDINGS]
        if not image_files or not mask_files:
            raise ShardError(
                f"images and masks are both in {images}; say what their names end in by --mask-suffix, e.g. _mask for "
                "0001_mask.png"
            )
    elif shared:  # one folder lies in the other, which holds more than that
        inner = masks if masks.resolve().is_relative_to(images.resolve()) else images
        outer_files = [file for file in (image_files if inner is masks else mask_files) if file not in shared]
        image_files, mask_files = (outer_files, mask_files) if inner is masks else (image_files, outer_files)
    return image_files, mask_files, [*in_images.others, *in_masks.others]


def _stems(folder: Path, files: Sequence[Path], suffix: str) -> list[tuple[str, Path]]:
    """(path under `folder` without suffix and ending, path) of all images whose name ends in `suffix`."""
    found = [
        (_stem(path, folder, suffix), path) for path in files if path.stem.endswith(suffix) and path.stem != suffix
    ]
    if not found:
        what = f" named *{suffix}.*" if suffix else ""
        raise ShardError(f"{folder} holds no images{what} (images by their endings: {len(files):,})")
    return found


def _stem(path: Path, folder: Path, suffix: str) -> str:
    relative = path.relative_to(folder)
    return relative.with_name(relative.stem.removesuffix(suffix)).as_posix()


def masks_by_stem(
    folder: Path, files: Sequence[Path], suffix: str, *, stems: Container[str] | None = None
) -> dict[str, Path]:
    """{path below the folder without suffix and ending: mask}.

    Where a lossy file lies beside a lossless one of the same name, it is not the mask.
    """
    by_stem: dict[str, Path] = {}
    for stem, mask in sorted(_stems(folder, files, suffix), key=lambda pair: pair[1].suffix.lower() in _LOSSY_ENDINGS):
        other = by_stem.setdefault(stem, mask)
        if other is not mask and (stems is None or stem in stems) and mask.suffix.lower() not in _LOSSY_ENDINGS:
            raise ShardError(f"two masks fit one image: {other} and {mask}; give --mask-suffix, or move one away")
    return by_stem


def common_suffix(stems: Sequence[str], longer: Sequence[str]) -> str:
    """What all of `stems` lack to be among `longer`; empty where there is no such thing."""
    there = set(longer)
    first = stems[0] if stems else ""
    rests = sorted(name[len(first) :] for name in longer if name.startswith(first) and name != first)
    return next((rest for rest in rests if all(stem + rest in there for stem in stems)), "")


def _suggest_suffix(stems: Sequence[str], mask_stems: Sequence[str], mask_suffix: str) -> str:
    """What to do about images without masks: the option that would pair them, where all names show it."""
    suffix = common_suffix(stems, mask_stems)
    if suffix:
        return f"all masks' names end in {suffix + mask_suffix}: give --mask-suffix {suffix + mask_suffix}"
    suffix = common_suffix(mask_stems, stems)
    if suffix:
        return f"all images' names end in {suffix}: give --image-suffix {suffix}"
    return "if their names end differently, give --image-suffix or --mask-suffix"
