"""A contact sheet of a set: images, their labels in colour, and every colour's name, so that a wrong order is seen."""

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_deeplab.data.legend import GAP, draw_legend, load_font
from dist_deeplab.data.packing.verify import load_sample
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.data.voc import PALETTE
from dist_deeplab.logs import format_names

_TILE = 200  # longer side of an image on the sheet, pixels
_LINE = 15  # height of a line under an image, pixels
_CAPTION_FONT = 11
_VOID_GREY = 224
_COLUMNS = 3


def contact_sheet(manifest: Manifest, *, num_samples: int) -> np.ndarray:
    """An image, uint8 [H, W, 3] RGB, of samples spread over the set: image and coloured label side by side.

    Above them the colour, number and name of every class, of class 0 too, and of void, which is light grey; under each
    pair its key and the names of all classes in it.
    """
    reader = ShardReader(manifest)
    count = min(num_samples, manifest.num_samples)
    palette = PALETTE.copy()
    palette[manifest.ignore_label] = _VOID_GREY
    cells = [_cell(*load_sample(reader, i * manifest.num_samples // count), manifest, palette) for i in range(count)]
    width = cells[0].width + GAP
    columns = min(_COLUMNS, count)
    rows = [cells[start : start + columns] for start in range(0, count, columns)]
    legend = draw_legend(
        [
            *((f"{n} {name}", palette[n]) for n, name in enumerate(manifest.class_names) if n != manifest.ignore_label),
            (f"{manifest.ignore_label} (void)", palette[manifest.ignore_label]),
        ],
        columns * width + GAP,
    )
    height = legend.height + GAP + sum(max(cell.height for cell in row) + GAP for row in rows)
    sheet = Image.new("RGB", (max(legend.width, columns * width + GAP), height), "white")
    sheet.paste(legend, (0, 0))
    top = legend.height + GAP
    for row in rows:
        for number, cell in enumerate(row):
            sheet.paste(cell, (GAP + number * width, top))
        top += max(cell.height for cell in row) + GAP
    return np.array(sheet)


def _cell(image: np.ndarray, label: np.ndarray, key: str, manifest: Manifest, palette: np.ndarray) -> Image.Image:
    """Image and label side by side above a caption of as many lines as it needs."""
    scale = _TILE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    colours = palette[cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)]
    there = np.unique(label).tolist()
    names = [name for value, name in enumerate(manifest.class_names) if value in there]
    width = 2 * _TILE + GAP // 2
    font = load_font(_CAPTION_FONT)
    lines = _wrapped(f"{key}: {format_names(names) or 'void alone'}", width, font)
    cell = Image.new("RGB", (width, size[1] + 4 + _LINE * len(lines)), "white")
    for left, part in ((0, shown), (_TILE + GAP // 2, colours)):
        cell.paste(Image.fromarray(part), (left, 0))
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((1, size[1] + 2 + number * _LINE), line, fill="black", font=font)
    return cell


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines of at most `width` pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
