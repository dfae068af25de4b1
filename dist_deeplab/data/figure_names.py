"""Names of classes and runs in matplotlib's figures: how wide they are, made shorter, and in the columns of a legend.

Imported where figures are drawn: matplotlib takes a moment.
"""

from collections.abc import Sequence

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

LEGEND = {"handlelength": 1.5, "handletextpad": 0.8, "columnspacing": 1.0}  # of figures' legends, in font sizes
_BORDER = 1.5  # left and right edge of a legend together, with a little slack, in font sizes
_POINTS_PER_INCH = 72


def literal(name: str) -> str:
    """A name that matplotlib shows unchanged: between two dollars it would read a formula, or fail to."""
    return name.replace("$", r"\$")


def shorten(name: str, length: int) -> str:
    """At most `length` characters of a name: its begin and its end, where similar names differ."""
    if len(name) <= length:
        return name
    end = (length - 1) // 3
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def widest(names: Sequence[str], *, font_size: float) -> float:
    """Inches that the widest name takes in matplotlib's own font; `font_size` in points."""
    font = FontProperties(size=font_size)
    widths = (text_to_path.get_text_width_height_descent(name, font, ismath=False)[0] for name in names)
    return max(widths, default=0.0) / _POINTS_PER_INCH


def legend_columns(names: Sequence[str], *, width: float, font_size: float, most: int) -> int:
    """Number of columns, 1 to `most`, in which a legend drawn with LEGEND is at most `width` inches wide."""
    unit = font_size / _POINTS_PER_INCH
    column = widest(names, font_size=font_size) + sum(LEGEND.values()) * unit
    return min(most, max(1, int((width + (LEGEND["columnspacing"] - _BORDER) * unit) / column)))
