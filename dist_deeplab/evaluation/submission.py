"""What the PASCAL VOC evaluation server takes: a tree of palette PNGs in a tar."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

from dist_deeplab.data import voc
from dist_deeplab.errors import UserError

ARCHIVE = "results.tar"


def masks_folder(out: Path, competition: str) -> Path:
    """Where the masks go: comp5 is trained on VOC's own data alone, comp6 on any (VOC2012 devkit, section 7)."""
    return out / "results" / "VOC2012" / "Segmentation" / f"{competition}_test_cls"


def require_voc_classes(class_names: Sequence[str]) -> None:
    """Check that a checkpoint knows VOC's classes.

    Raises:
        UserError: others; the server would take the file and give a meaningless score.
    """
    if tuple(class_names) != voc.CLASS_NAMES:
        raise UserError("--voc-submission needs a checkpoint of VOC's 21 classes, in VOC's order; this one has others")


def pack(out: Path) -> Path:
    """Write `out`/results.tar of the tree `out`/results and return it; the same files give the same bytes."""
    archive = out / ARCHIVE
    with tarfile.open(archive, "w") as tar:
        for path in sorted((out / "results").rglob("*.png")):
            info = tar.gettarinfo(path, arcname=path.relative_to(out).as_posix())
            info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode = 0, 0, 0, "", "", 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)
    return archive
