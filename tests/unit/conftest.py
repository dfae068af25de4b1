"""Data shared by the unit tests: a tiny VOC folder and its shards. Both are read-only; take `own_set` to damage one."""

import multiprocessing
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from dist_deeplab.data import voc
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.lists import read_voc_list
from dist_deeplab.data.packing.writer import PackingOptions, write_shards
from dist_deeplab.data.shards.manifest import Manifest, load_manifest

# The same examples on every machine, however slow it is: a failure is a change of the code.
settings.register_profile("unit", derandomize=True, deadline=None, database=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def no_store_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the MLflow store that the shell, or a fixture of other tests on this worker, has named."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def pytest_sessionfinish() -> None:
    """End loader workers that a failed test left behind: they ignore SIGTERM, and pytest would wait for them."""
    for child in multiprocessing.active_children():
        child.kill()


SIZES = ((40, 56), (57, 41), (33, 33), (24, 70), (65, 17), (50, 50), (31, 64), (48, 36))  # (height, width)
NUM_VAL = 5


def draw_image(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a smooth colour image, uint8 [height, width, 3]: smooth, so that interpolation can be compared."""
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_label(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return class indices, uint8 [height, width]: background, rectangles of other classes, each with a void border."""
    label = np.zeros((height, width), dtype=np.uint8)
    for _ in range(3):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        bottom, right = top + rng.integers(8, height), left + rng.integers(8, width)
        label[top:bottom, left:right] = voc.IGNORE_LABEL
        label[top + 1 : bottom - 1, left + 1 : right - 1] = rng.integers(1, 21)
    return label


def save_palette_png(path: Path, label: np.ndarray) -> None:
    """Write a palette PNG in which no index has a colour of its own value, so that mixing the two up is seen."""
    png = Image.fromarray(label)
    png.putpalette([channel for index in range(256) for channel in (255 - index, (7 * index + 90) % 256, 3)])
    png.save(path)


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC folder with 8 images of several sizes; the list `train` names all of them, `val` the first 5."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    keys = [f"2007_{number:06d}" for number in range(len(SIZES))]
    for key, (height, width) in zip(keys, SIZES, strict=True):
        cv2.imwrite(str(root / f"JPEGImages/{key}.jpg"), draw_image(height, width, rng))
        save_palette_png(root / f"SegmentationClass/{key}.png", draw_label(height, width, rng))
    for split, listed in (("train", keys), ("val", keys[:NUM_VAL])):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{key}\n" for key in listed))
    return root


@pytest.fixture(scope="session")
def shard_set(voc_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The shards of `voc_root`'s 8 images: 3 + 3 + 2."""
    manifest = write_shards(
        read_voc_list(voc_root, "train"),
        tmp_path_factory.mktemp("shards"),
        split="train",
        labels=LabelSpace(voc.CLASS_NAMES, voc.IGNORE_LABEL),
        options=PackingOptions(samples_per_shard=3),
    )
    return load_manifest(manifest.path)


@pytest.fixture
def own_set(shard_set: Manifest, tmp_path: Path) -> Path:
    """The manifest file of a copy of `shard_set` that the test may damage."""
    folder = shutil.copytree(shard_set.path.parent, tmp_path / "own_set")
    return folder / shard_set.path.name
