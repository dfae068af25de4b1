"""What can't be trained on or scored is refused by its manifest alone; images that two sets share are counted."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.samples import Reading
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.packing.writer import PackingOptions, write_shards
from dist_deeplab.data.shards.checks import count_shared, require_scorable, require_trainable
from dist_deeplab.data.shards.index_file import digest_of
from dist_deeplab.data.shards.keys import key_hash
from dist_deeplab.data.shards.manifest import Manifest, ShardError
from dist_deeplab.data.windows import Windows

VOID = 255


def pack(folder: Path, *values: int, side: int = 40, tiles: Windows | None = None, prefix: str = "image") -> Manifest:
    """A set of as many images as values: each mask holds that value alone."""
    samples = []
    for number, value in enumerate(values):
        key = f"{prefix}_{number}"
        cv2.imwrite(str(folder / f"{key}.jpg"), np.full((side, side, 3), 90, np.uint8))
        cv2.imwrite(str(folder / f"{key}.png"), np.full((side, side), value, np.uint8))
        samples.append(SourceSample(key, folder / f"{key}.jpg", folder / f"{key}.png"))
    options = PackingOptions(reading=Reading(tiles=tiles), overwrite=True)
    labels = LabelSpace(("background", "road", "tram"), VOID)
    return write_shards(samples, folder / "out", split=prefix, labels=labels, options=options)


def test_a_set_of_two_classes_is_trained_on_and_scored(tmp_path: Path) -> None:
    manifest = pack(tmp_path, 0, 2, VOID)
    require_trainable(manifest)
    require_scorable(manifest)


def test_a_set_of_void_alone_is_neither_trained_on_nor_scored(tmp_path: Path) -> None:
    manifest = pack(tmp_path, VOID, VOID)
    path = str(manifest.path)
    with pytest.raises(
        ShardError, match=r"all labels of the set .* are void \(255\): .* nothing to train on"
    ) as caught:
        require_trainable(manifest)
    assert path in str(caught.value)
    with pytest.raises(ShardError, match=r"all labels of the set .* are void \(255\): .* nothing to score") as caught:
        require_scorable(manifest)
    assert path in str(caught.value)


@pytest.mark.parametrize(("value", "name"), [(0, "background"), (2, "tram")])
def test_a_set_of_one_class_is_scored_but_not_trained_on(value: int, name: str, tmp_path: Path) -> None:
    """A part of a validation set may well hold one class alone; what is learnt from one predicts it everywhere."""
    manifest = pack(tmp_path, value, VOID)
    with pytest.raises(ShardError, match=rf"one class alone \({name}\), .* 100 %.* label map"):
        require_trainable(manifest)
    require_scorable(manifest)


def test_a_set_of_tiles_is_trained_on_but_not_scored(tmp_path: Path) -> None:
    manifest = pack(tmp_path, 0, 1, side=200, tiles=Windows(128, 16))
    assert manifest.num_samples > 2
    require_trainable(manifest)
    with pytest.raises(ShardError, match=r"cut into tiles of 128 pixels.* pack it without --tile"):
        require_scorable(manifest)


def test_shared_images_are_counted_by_key(tmp_path: Path) -> None:
    trained = pack(tmp_path, 0, 1, 1, 2)
    (tmp_path / "b").mkdir()
    assert count_shared(trained.key_hashes, pack(tmp_path / "b", 0, 0, 1)) == 3
    (tmp_path / "c").mkdir()
    assert count_shared(trained.key_hashes, pack(tmp_path / "c", 0, 1, prefix="other")) == 0
    assert count_shared(trained.key_hashes, trained) == 4
    assert count_shared(np.zeros(0, np.uint64), trained) == 0


def test_contents_change_with_an_image_a_label_or_a_key_and_not_with_order_or_shards(tmp_path: Path) -> None:
    def contents(name: str, *values: int, side: int = 40, prefix: str = "image") -> str:
        (tmp_path / name).mkdir()
        return pack(tmp_path / name, *values, side=side, prefix=prefix).contents

    first = contents("a", 0, 1, 2)
    assert contents("again", 0, 1, 2) == first
    others = [contents("b", 0, 1, 1), contents("c", 1, 0, 2), contents("d", 0, 1, 2, side=48)]
    others += [contents("e", 0, 1, 2, prefix="other"), contents("f", 0, 1)]
    assert len({first, *others}) == 6
    manifest = pack(tmp_path / "again", 0, 1, 2)
    rows = np.concatenate(list(manifest.open_index().chunks()))
    assert digest_of([rows[[2]], rows[:2]]) == first


def test_of_cut_lists_of_keys_the_share_is_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 images in each set, 20 of them in both, 16 keys kept of each: near 20, since hashes are spread evenly."""
    monkeypatch.setattr("dist_deeplab.data.shards.checks.MAX_KEY_HASHES", 16)
    scored = dataclasses.replace(pack(tmp_path, 0, 1), num_samples=40)
    counts = []
    for trial in range(200):
        keys = [f"{trial}_{number}" for number in range(60)]
        hashes = [np.sort(np.array([key_hash(key) for key in part], np.uint64))[:16] for part in (keys[:40], keys[20:])]
        vars(scored)["key_hashes"] = hashes[1]
        counts.append(count_shared(hashes[0], scored))
    assert abs(np.mean(counts) - 20) < 1.5
    assert all(0 <= count <= 40 for count in counts)
