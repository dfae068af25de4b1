"""VOC 2012 and SBD from their archives to folders: SegmentationClassAug and the list train_aug.

`train_aug` is (VOC train + SBD train + SBD val) without VOC val: 1,464 + 9,118 = 10,582 images (the split that DeepLab
and all later papers train on). The images of VOC train keep VOC's own masks; the others have SBD's, which know no void.
All images are in VOC's archive; of SBD only the labels are used.
"""

import functools
import io
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_deeplab.data import voc
from dist_deeplab.data.packing.ordered_map import ordered_map
from dist_deeplab.data.packing.text_files import read_lines
from dist_deeplab.data.shards.manifest import ShardError
from dist_deeplab.downloads import DownloadError, Expected, Progress, fetch, is_url
from dist_deeplab.errors import first_line
from dist_deeplab.files import digest

VOC_PARTS = ("JPEGImages/", "SegmentationClass/", "ImageSets/Segmentation/")
SBD_PARTS = ("cls/", "train.txt", "val.txt")
AUG_MASKS = "SegmentationClassAug"


@dataclass(frozen=True)
class Archive:
    """An archive: where it may be had, in the order of trying (URLs or paths), and its MD5 (empty: not checked)."""

    name: str
    sources: tuple[str, ...]
    md5: str


VOC2012 = Archive(
    "VOCtrainval_11-May-2012.tar",
    (
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://pjreddie.com/media/files/VOCtrainval_11-May-2012.tar",
    ),
    "6cd6e144f989b92b3379bac3b3de84fd",
)
"""The development kit's archive (2.0 GB). Its owners publish no checksum: this is the one in torchvision's `voc.py`."""

SBD = Archive(
    "benchmark.tgz",
    (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    ),
    "82b4d87ceb2ed10f6038a1cba92111cb",
)
"""Hariharan et al., Semantic contours from inverse detectors (1.4 GB). The checksum is in torchvision's `sbd.py`."""


def get_archive(archive: Archive, folder: Path, *, progress: Progress | None = None) -> Path:
    """The archive's path: the first source that can be had, verified.

    Raises:
        ShardError: none can be had; why is said of each.
    """
    problems = []
    for source in archive.sources:
        try:
            if is_url(source):
                expected = Expected(md5=archive.md5 or None)
                return fetch(source, folder, name=archive.name, expected=expected, progress=progress)
            path = Path(source).expanduser()
            if not path.is_file():
                problems.append(f"there is no file {path}")
            elif archive.md5 and (found := digest(path, "md5")) != archive.md5:
                problems.append(f"{path} has the MD5 {found}, not {archive.md5}")
            else:
                return path
        except DownloadError as error:
            problems.append(str(error))
    raise ShardError(f"cannot get {archive.name}: {'; '.join(problems)}")


def unpack(archive: Path, folder: Path, *, inside: str, parts: Sequence[str]) -> Path:
    """Unpack what lies under `inside/` and begins with one of `parts` into `folder`; nothing if it is there already.

    Killed, it leaves a hidden folder, which the next call removes.

    Raises:
        ShardError: no such archive, damaged, or it holds nothing of that.
    """
    if folder.is_dir():
        return folder
    scratch = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    count = 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = re.sub(r"^(\./)*", "", member.name).removeprefix(f"{inside}/")
                if member.isfile() and name.startswith(tuple(parts)):
                    target = scratch / name
                    if scratch.resolve() not in target.resolve().parents:
                        raise ShardError(
                            f"{archive} holds {member.name!r}, which leads out of its folder; it is not VOC's"
                        )
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member)
                    assert content is not None
                    with target.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    count += 1
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ShardError(f"{archive} can't be unpacked ({first_line(error)}); delete it and start again") from None
    if not count:
        raise ShardError(f"{archive} holds nothing under {inside}/{'|'.join(parts)}; is it the right archive?")
    scratch.rename(folder)
    return folder


def augment(
    voc_root: Path,
    sbd: Path,
    *,
    workers: int = 1,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[str]:
    """Write SegmentationClassAug and ImageSets/Segmentation/train_aug.txt into `voc_root`, and return the list.

    Args:
        voc_root: VOCdevkit/VOC2012.
        sbd: folder that holds `cls`, `train.txt` and `val.txt`.
        workers: processes.
        progress: wraps the keys, to show how far this is.

    Raises:
        ShardError: a list or label file is missing or not what it should be.
    """
    lists = voc_root / "ImageSets" / "Segmentation"
    own = [key for key in read_lines(lists / "train.txt") if key]
    val = {key for key in read_lines(lists / "val.txt") if key}
    theirs = {key for name in ("train.txt", "val.txt") for key in read_lines(sbd / name) if key}
    keys = sorted((set(own) | theirs) - val)
    folder = voc_root / AUG_MASKS
    folder.mkdir(exist_ok=True)
    write = functools.partial(_write_mask, voc_root=voc_root, sbd=sbd, own=frozenset(own))
    for _ in ordered_map(write, progress(keys), workers=workers):
        pass
    (lists / "train_aug.txt").write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    return keys


def _write_mask(key: str, *, voc_root: Path, sbd: Path, own: frozenset[str]) -> None:
    target = voc_root / AUG_MASKS / f"{key}.png"
    unfinished = target.with_name(f".{key}.unfinished")
    if key in own:
        shutil.copyfile(voc_root / "SegmentationClass" / f"{key}.png", unfinished)
    else:
        voc.save_palette_png(read_sbd_label(sbd / "cls" / f"{key}.mat"), unfinished)
    unfinished.replace(target)


def read_sbd_label(path: Path) -> np.ndarray:
    """The class indices, uint8 [H, W], of a `cls/<key>.mat`: the field Segmentation of the struct GTcls.

    Raises:
        ShardError: missing, damaged, or of another kind.
    """
    from scipy.io import loadmat

    try:
        label = loadmat(io.BytesIO(path.read_bytes()), squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
    except FileNotFoundError:
        raise ShardError(f"SBD's lists name {path}, which is not there; unpack {SBD.name} again") from None
    except Exception as error:  # scipy raises whatever a damaged file leads to
        raise ShardError(f"{path} can't be read as an SBD label ({first_line(error)})") from None
    label = np.asarray(label)
    if label.ndim != 2 or label.dtype.kind not in "ui" or (label.size and label.max() >= len(voc.CLASS_NAMES)):
        raise ShardError(f"{path} holds no class indices of VOC: {label.dtype} {label.shape}")
    return label.astype(np.uint8)
