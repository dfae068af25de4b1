"""Samples that a text file names: VOC's lists of names, and lists of `image label` pairs."""

import re
from pathlib import Path

from dist_deeplab.data.folders import list_folder
from dist_deeplab.data.packing.sources import SourceSample, key_of
from dist_deeplab.data.packing.text_files import read_lines
from dist_deeplab.data.shards.manifest import ShardError

_HEADER = {"image", "images", "img", "image_path", "label", "labels", "mask", "masks", "label_path", "mask_path"}


def read_voc_list(voc_root: Path, split: str, *, masks: str = "SegmentationClass") -> list[SourceSample]:
    """The samples of `ImageSets/Segmentation/<split>.txt` in a VOCdevkit/VOC2012 folder.

    A line names an image with or without its ending; a second column of 1, as VOC's lists of classes have it, is
    tolerated. Images and masks may have any ending.

    Args:
        voc_root: the folder that holds JPEGImages.
        split: name of the list.
        masks: folder of the masks; SegmentationClassAug for train_aug.

    Raises:
        ShardError: no such folder or list; a line with another second column; two files of one name.
    """
    listing = voc_root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not voc_root.is_dir():
        raise ShardError(f"there is no folder {voc_root}; give the one that holds JPEGImages, e.g. VOCdevkit/VOC2012")
    if not listing.is_file():
        there = ", ".join(sorted(file.stem for file in listing.parent.glob("*.txt"))) or "none"
        raise ShardError(f"there is no list {listing}; lists there: {there}")
    images, labels = _by_name(voc_root / "JPEGImages"), _by_name(voc_root / masks)
    samples = []
    for number, line in enumerate(read_lines(listing), start=1):
        if not line:
            continue
        name = _listed_name(line, images, where=f"line {number} of {listing}")
        image, label = images.get(name), labels.get(name)
        for found in (image, label):
            if found is not None and len(found) > 1:
                raise ShardError(f"line {number} of {listing} means {found[0]} or {found[1]}; move one of them away")
        samples.append(
            SourceSample(
                key_of(name),
                image[0] if image else voc_root / "JPEGImages" / f"{name}.jpg",  # whose absence is an error later
                label[0] if label else voc_root / masks / f"{name}.png",
            )
        )
    return samples


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """{path below the folder without ending: files}, and the same with ending."""
    found: dict[str, list[Path]] = {}
    for path in list_folder(folder).images if folder.is_dir() else []:
        relative = path.relative_to(folder)
        found.setdefault(relative.with_name(relative.stem).as_posix(), []).append(path)
    return found


def _listed_name(line: str, images: dict[str, list[Path]], *, where: str) -> str:
    if line in images:
        return line
    without_ending = re.sub(r"\.\w+$", "", line)
    if without_ending in images:
        return without_ending
    columns = line.rsplit(maxsplit=1)
    if len(columns) == 2 and columns[0] in images:
        if columns[1] != "1":
            raise ShardError(
                f"{where} has {columns[1]!r} beside the name; keep the lines that are to be packed, with 1"
            )
        return columns[0]
    return line


def read_pair_list(data_root: Path, listing: Path) -> list[SourceSample]:
    """The samples of a file with one `image label` pair of paths per line, under `data_root` (DrSleep's format).

    Paths are separated by a tab, a comma or spaces, whichever gives two files that exist; they may hold spaces. Blank
    lines, CRLF and a header line are tolerated; a leading slash means `data_root` where that file exists, as there.
    The key is the image's file name without its ending.

    Raises:
        ShardError: no such file, or a line that is not a pair, or could be two.
    """
    if not listing.is_file():
        raise ShardError(f"there is no list file {listing}")
    samples = []
    for number, line in enumerate(read_lines(listing), start=1):
        if not line or (number == 1 and {*re.split(r"[\s,;]+", line.lower())} <= _HEADER):
            continue
        likely, all_readings = _ways_to_split(line)
        readings = [tuple(_resolve(data_root, part) for part in pair) for pair in dict.fromkeys(all_readings)]
        existing = [pair for pair in readings if all(_is_file(path) for path in pair)]
        if len(existing) > 1:
            raise ShardError(f"line {number} of {listing} can be read as several pairs; separate by a tab: {line!r}")
        if not existing and not likely:
            raise ShardError(f"line {number} of {listing} is not an `image label` pair: {line!r}")
        image, label = existing[0] if existing else (_resolve(data_root, part) for part in likely[0])
        samples.append(SourceSample(key_of(image.stem), image, label))
    return samples


def _ways_to_split(line: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The readings of a line that has one separator, and all readings as two paths, which may hold spaces."""
    splits = [re.split(separator, line) for separator in (r"\t+", r"\s*[,;]\s*", r"\s+")]
    likely = [(_unquoted(parts[0]), _unquoted(parts[1])) for parts in splits if len(parts) == 2 and all(parts)]
    gaps = re.finditer(r"\s+", line)
    return likely, likely + [(_unquoted(line[: gap.start()]), _unquoted(line[gap.end() :])) for gap in gaps]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _resolve(data_root: Path, text: str) -> Path:
    below, absolute = data_root / text.lstrip("/"), Path(text)
    return absolute if absolute.is_absolute() and _is_file(absolute) and not _is_file(below) else below


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # e.g. a line that is too long for a file's name
        return False
