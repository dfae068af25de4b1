"""Annotations as tools export them -> a mask per image: COCO JSON, labelme JSON, CVAT's XML.

Roboflow's exports are COCO JSON (`_annotations.coco.json`), or masks that need none of this. Pixels of no object are
class 0, background. Where objects overlap, what is drawn later is on top:

- COCO: objects in order of falling area, so that small ones lie on large ones (the file has no order); `iscrowd`
  regions first, under all others.
- labelme: shapes in the file's order, as labelme's own export does.
- CVAT: shapes by their `z_order`, then in the file's order.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np

from dist_deeplab.data.shards.manifest import ShardError

BACKGROUND = "background"
_VOID_LABEL = "__ignore__"  # labelme's name of what is void


@dataclass(frozen=True)
class Region:
    """Part of an object: polygons, float [n, 2] of (x, y) in pixels, or a mask, bool [H, W], at (left, top)."""

    label: str
    polygons: tuple[np.ndarray, ...] = ()
    mask: np.ndarray | None = None
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's file name as the annotations have it, its height and width, and its regions from bottom to top."""

    name: str
    size: tuple[int, int]
    regions: tuple[Region, ...]


def read_annotations(source: Path) -> list[AnnotatedImage]:
    """The annotated images of a COCO JSON, of CVAT's XML, or of a folder of labelme's JSON files.

    Raises:
        ShardError: none of these, damaged, or pycocotools (extra `annotations`) is missing.
    """
    if source.is_dir():
        files = sorted(file for file in source.rglob("*.json") if not file.name.startswith("."))
        if not files:
            raise ShardError(f"{source} holds no labelme JSON files; give COCO's JSON or CVAT's XML by its file name")
        return [_read_labelme(file, _json(file)) for file in files]
    if not source.is_file():
        raise ShardError(f"there is no file or folder of annotations at {source}")
    if source.suffix.lower() == ".xml":
        return _read_cvat(source)
    content = _json(source)
    return [_read_labelme(source, content)] if "shapes" in content else _read_coco(source, content)


def class_names_in(images: Sequence[AnnotatedImage]) -> tuple[str, ...]:
    """Background, then all labels that occur, sorted; without what labelme calls void."""
    labels = {region.label for image in images for region in image.regions}
    return (BACKGROUND, *sorted(labels - {BACKGROUND, "_background_", _VOID_LABEL}))


def draw_mask(image: AnnotatedImage, class_names: Sequence[str], *, ignore_label: int) -> np.ndarray:
    """The mask of an image, uint8 [H, W].

    Raises:
        ShardError: a region's label is not among the class names.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    numbers |= {_VOID_LABEL: ignore_label, "_background_": 0}
    mask = np.zeros(image.size, dtype=np.uint8)
    for region in image.regions:
        if region.label not in numbers:
            raise ShardError(f"{image.name} has an object {region.label!r}, which the class names do not hold")
        value = numbers[region.label]
        points = [np.round(polygon).astype(np.int32) for polygon in region.polygons if len(polygon) > 2]
        if points:
            cv2.fillPoly(mask, points, (value,))  # even-odd: a polygon within another one is a hole
        if region.mask is not None:
            left, top = region.corner
            part = mask[top : top + region.mask.shape[0], left : left + region.mask.shape[1]]
            part[region.mask[: part.shape[0], : part.shape[1]]] = value
    return mask


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ShardError(f"{file} can't be read as JSON ({error})") from None
    keys = content.keys() if isinstance(content, dict) else set()
    if not ({"shapes"} <= keys or {"images", "annotations"} <= keys):
        raise ShardError(f"{file} is neither COCO's JSON (images, annotations, categories) nor labelme's (shapes)")
    return content


def _read_labelme(file: Path, content: dict[str, Any]) -> AnnotatedImage:
    try:
        size = (int(content["imageHeight"]), int(content["imageWidth"]))
        regions = tuple(_labelme_region(shape) for shape in content["shapes"])
        return AnnotatedImage(str(content["imagePath"]).replace("\\", "/"), size, regions)
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{file} is not labelme's JSON of polygons (see {error})") from None


def _labelme_region(shape: dict[str, Any]) -> Region:
    kind, points = shape.get("shape_type", "polygon"), np.asarray(shape["points"], dtype=np.float64)
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    elif kind == "circle":
        angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
        radius = float(np.hypot(*(points[1] - points[0])))
        points = points[0] + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif kind != "polygon":
        raise ValueError(f"a shape of kind {kind!r}, which has no area")
    return Region(str(shape["label"]), (points,))


def _read_coco(file: Path, content: dict[str, Any]) -> list[AnnotatedImage]:
    try:
        from pycocotools import mask as coco  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise ShardError("COCO's JSON needs pycocotools; pip install 'dist_deeplab[annotations]'") from None
    try:
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        objects: dict[Any, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            objects.setdefault(annotation["image_id"], []).append(annotation)
        images = []
        for image in content["images"]:
            size = (int(image["height"]), int(image["width"]))
            order = sorted(
                objects.get(image["id"], []), key=lambda o: (not o.get("iscrowd", 0), -float(o.get("area", 0)))
            )
            regions = []
            for annotation in order:
                shape = annotation["segmentation"]
                if isinstance(shape, list):  # polygons: parts of one object, whose union it is
                    encoded = coco.merge(coco.frPyObjects(shape, *size)) if shape else None
                else:
                    encoded = coco.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
                if encoded is not None:
                    mask = coco.decode(encoded).astype(bool)
                    regions.append(Region(names[annotation["category_id"]], mask=mask))
            images.append(AnnotatedImage(str(image["file_name"]), size, tuple(regions)))
        return images
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ShardError(f"{file} is not COCO's JSON of segmentations (see {error!r})") from None


def _crowds_then_falling_area(annotation: dict[str, Any]) -> tuple[bool, float]:
    return not annotation.get("iscrowd", 0), -float(annotation.get("area", 0))


def _read_cvat(file: Path) -> list[AnnotatedImage]:
    try:
        root = ElementTree.parse(file).getroot()
        images = []
        for image in root.iter("image"):
            size = (int(image.attrib["height"]), int(image.attrib["width"]))
            shapes = sorted((shape for shape in image if "label" in shape.attrib), key=_z_order)
            regions = tuple(region for shape in shapes for region in _cvat_regions(shape))
            images.append(AnnotatedImage(image.attrib["name"], size, regions))
    except (ElementTree.ParseError, OSError, KeyError, ValueError) as error:
        raise ShardError(f"{file} is not CVAT's XML of images (see {error!r})") from None
    if not images:
        raise ShardError(f"{file} holds no images; export from CVAT as `CVAT for images 1.1`")
    return images


def _z_order(shape: ElementTree.Element) -> int:
    return int(shape.attrib.get("z_order", 0))


def _cvat_regions(shape: ElementTree.Element) -> Iterator[Region]:
    values, label = shape.attrib, shape.attrib["label"]
    if shape.tag == "polygon":
        points = [tuple(map(float, point.split(","))) for point in values["points"].split(";")]
        yield Region(label, (np.array(points),))
    elif shape.tag == "box":
        left, top, right, bottom = (float(values[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        yield Region(label, (np.array([(left, top), (right, top), (right, bottom), (left, bottom)]),))
    elif shape.tag == "mask":  # runs of 0 and 1 by turns, row by row, within a box
        height, width = int(values["height"]), int(values["width"])
        runs = [int(run) for run in values["rle"].split(",")]
        if sum(runs) != height * width or min(runs) < 0:
            raise ValueError(f"a mask whose runs do not fill {width} x {height} pixels")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        yield Region(label, mask=flat.reshape(height, width), corner=(int(values["left"]), int(values["top"])))
    else:
        raise ValueError(f"a shape of kind {shape.tag!r}, which has no area")
