"""Annotations of every kind become the masks that they describe, with the stated order of overlap."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.commands import shards as tool
from dist_deeplab.data.packing.annotations import class_names_in, draw_mask, read_annotations
from dist_deeplab.data.shards.manifest import ShardError, load_manifest

NAMES = ("background", "large", "small")


def square(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def expected(first: str, then: str) -> np.ndarray:
    """A large square of 11..30 and a small one of 21..35, drawn in this order on 40 x 50."""
    mask = np.zeros((40, 50), np.uint8)
    for name in (first, then):
        part = slice(10, 31) if name == "large" else slice(20, 36)
        mask[part, part] = NAMES.index(name)
    return mask


def labelme(folder: Path, shapes: list[tuple[str, list[list[int]]]]) -> Path:
    content = {"imagePath": "a.jpg", "imageHeight": 40, "imageWidth": 50}
    content |= {"shapes": [{"label": label, "points": points, "shape_type": "polygon"} for label, points in shapes]}
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(json.dumps(content))
    return folder


LARGE, SMALL = ("large", square(10, 10, 30, 30)), ("small", square(20, 20, 35, 35))


@pytest.mark.parametrize("shapes", [[LARGE, SMALL], [SMALL, LARGE]])
def test_labelmes_later_shapes_lie_on_earlier_ones(shapes: list[tuple[str, list[list[int]]]], tmp_path: Path) -> None:
    (image,) = read_annotations(labelme(tmp_path / "l", shapes))
    assert class_names_in([image]) == NAMES
    assert (draw_mask(image, NAMES, ignore_label=255) == expected(shapes[0][0], shapes[1][0])).all()


def test_labelmes_rectangles_and_ignored_shapes_are_read(tmp_path: Path) -> None:
    folder = labelme(tmp_path / "l", [("__ignore__", square(0, 0, 5, 5))])
    content = json.loads((folder / "a.json").read_text())
    content["shapes"].append({"label": "large", "points": [[10, 10], [30, 30]], "shape_type": "rectangle"})
    (folder / "a.json").write_text(json.dumps(content))
    mask = draw_mask(read_annotations(folder)[0], ("background", "large"), ignore_label=255)
    assert (mask[:6, :6] == 255).all()
    assert (mask[10:31, 10:31] == 1).all()


@pytest.mark.parametrize(("order", "top"), [((0, 0), "small"), ((1, 0), "large")])
def test_cvats_shapes_lie_by_their_z_order(order: tuple[int, int], top: str, tmp_path: Path) -> None:
    rows = "".join(
        f'<polygon label="{label}" z_order="{z}" points="{";".join(f"{x},{y}" for x, y in points)}"/>'
        for z, (label, points) in zip(order, (LARGE, SMALL), strict=True)
    )
    rle = '<mask label="small" left="2" top="1" width="3" height="2" rle="1,2,2,1" z_order="2"/>'
    file = tmp_path / "annotations.xml"
    file.write_text(f'<annotations><image name="a.jpg" width="50" height="40">{rows}{rle}</image></annotations>')
    want = expected("small" if top == "large" else "large", top)
    want[1:3, 2:5] = [[0, 2, 2], [0, 0, 2]]
    assert (draw_mask(read_annotations(file)[0], NAMES, ignore_label=255) == want).all()


def test_cocos_small_objects_lie_on_large_ones_and_crowds_under_all(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    small, crowd = np.zeros((40, 50), np.uint8), np.zeros((40, 50), np.uint8)
    small[20:36, 20:36], crowd[:15] = 1, 1
    encoded = coco.encode(np.asfortranarray(small))
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], crowd.ravel(order="F"), [2]])))).tolist()
    objects = [
        {"category_id": 7, "segmentation": {"size": [40, 50], "counts": encoded["counts"].decode()}, "area": 256},
        {"category_id": 3, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]], "area": 400},
        {"category_id": 7, "segmentation": {"size": [40, 50], "counts": [0, *runs]}, "area": 1, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 50}],
        "categories": [{"id": 3, "name": "large"}, {"id": 7, "name": "small"}],
        "annotations": [{"id": number, "image_id": 1} | entry for number, entry in enumerate(objects)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    mask = draw_mask(read_annotations(tmp_path / "coco.json")[0], NAMES, ignore_label=255)
    assert (mask[20:36, 20:36] == 2).all(), "the smaller object, listed first"
    assert (mask[11:19, 11:29] == 1).all(), "over the crowd"
    assert (mask[:9] == 2).all()
    assert (mask[36:] == 0).all()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shapes": [{}]}', '{"images": [], "annotations": [1]}'])
def test_what_is_not_an_annotation_is_named(text: str, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools.mask")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ShardError, match=r"x\.json"):
        read_annotations(tmp_path / "x.json")
    (tmp_path / "x.xml").write_text(text)
    with pytest.raises(ShardError, match=r"x\.xml"):
        read_annotations(tmp_path / "x.xml")


def test_a_labelme_folder_becomes_masks_and_then_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = labelme(tmp_path / "photos", [LARGE, SMALL])
    for name in ("a.jpg", "unlabelled.jpg"):
        Image.new("RGB", (50, 40), (9, 99, 199)).save(folder / name)
    out = tmp_path / "masks"
    assert tool.main(["masks", str(folder), "--images", str(folder), "--out", str(out)]) == 0
    assert "1 file is left out (images without annotations): " in " ".join(capsys.readouterr().out.split())
    assert (np.asarray(Image.open(out / "a.png")) == expected("large", "small")).all()
    pack = ["--list", str(out / "list.txt"), "--class-names", str(out / "names.txt"), "--split", "t"]
    assert tool.main([*pack, "--out", str(tmp_path / "shards")]) == 0
    manifest = load_manifest(tmp_path / "shards" / "t.json")
    assert manifest.class_names == NAMES
    assert manifest.class_pixels == tuple(np.bincount(expected("large", "small").ravel()).tolist())
