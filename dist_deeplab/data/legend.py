"""Names and colours of classes, drawn as wide as they are: nothing is cut."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 6  # pixels between images and around names
_SHOWN_WIDTH = 1600  # pixels of a screen that a wider image is scaled down to: its legend is drawn larger by as much
_LINE, _FONT = 24, 16  # pixels at that width

Entry = tuple[str, np.ndarray]
"""A name and its colour, uint8 [3] RGB."""


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: Pillow's own font has no accented, Greek or Cyrillic letters."""
    from matplotlib import get_data_path  # 0.3 s

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def draw_legend(entries: Sequence[Entry], width: int) -> Image.Image:
    """Squares of the classes' colours with their names, in lines of `width` pixels, more where a name is wider."""
    scale = max(1.0, width / _SHOWN_WIDTH)
    line, pad, font = round(scale * _LINE), round(scale * GAP), load_font(round(scale * _FONT))
    lengths = [line + int(np.ceil(font.getlength(name))) + 2 * pad for name, _ in entries]
    width = max([width, *(pad + length for length in lengths)])
    places, x, y = [], pad, 0
    for (name, color), length in zip(entries, lengths, strict=True):
        if x > pad and x + length > width:
            x, y = pad, y + line
        places.append((x, y, name, color))
        x += length
    legend = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, color in places:
        square = (x, y + line // 5, x + 3 * line // 5, y + 4 * line // 5)
        draw.rectangle(square, fill=tuple(color.tolist()), outline="black", width=max(1, round(scale)))
        draw.text((x + line, y + line // 2), name, fill="black", font=font, anchor="lm")
    return legend
