"""Predictions drawn beside their image, with a legend that can be read at any size."""

import numpy as np
import pytest
from PIL import Image

from dist_deeplab.data.legend import draw_legend, load_font
from dist_deeplab.data.voc import CLASS_NAMES, PALETTE
from dist_deeplab.evaluation.drawing import side_by_side


@pytest.mark.parametrize(("width", "height"), [(320, 240), (1600, 1000), (6000, 4000)])
def test_the_legend_is_readable_once_the_image_is_as_wide_as_a_screen(width: int, height: int) -> None:
    pred = np.zeros((height, width), dtype=np.uint8)
    pred[: height // 2] = 15
    drawn = side_by_side(np.full((height, width, 3), 90, dtype=np.uint8), pred, CLASS_NAMES)
    shown = drawn.reduce(max(1, round(drawn.width / 1600)))
    legend = np.asarray(shown)[round(height * shown.width / drawn.width) + 2 :]
    text_rows = np.flatnonzero((legend[:, 100:] < 100).all(2).any(1))
    assert len(text_rows) >= 9, "pixels from the top of a letter to its bottom"
    assert (np.asarray(drawn)[height:] == PALETTE[15]).all(2).sum() > 100


def test_names_that_do_not_fit_go_to_another_line() -> None:
    names = [f"a class with a long name {number}" for number in range(21)]
    pred = np.arange(21, dtype=np.uint8).reshape(3, 7).repeat(30, 0).repeat(30, 1)
    drawn = side_by_side(np.zeros((*pred.shape, 3), dtype=np.uint8), pred, names)
    assert drawn.height - 90 > 4 * 24
    assert isinstance(drawn, Image.Image)


@pytest.mark.parametrize("letters", ["àéü", "ßøł", "жшю", "αβγ"])
def test_letters_beyond_ascii_are_drawn_as_themselves(letters: str) -> None:
    font = load_font(16)
    shapes = {bytes(font.getmask(letter)) for letter in f"{letters}\uffff"}
    assert len(shapes) == 4, "three letters, and the box of one that no font has"
    one, other = (np.asarray(draw_legend([(name, PALETTE[1])], 200)) for name in letters[:2])
    assert (one != other).any()
