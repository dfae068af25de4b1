"""Counts and durations as people write them."""

import pytest

from dist_deeplab.logs import format_count, format_duration


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((1, "shard"), "1 shard"),
        ((0, "node"), "0 nodes"),
        ((1464, "image"), "1,464 images"),
        ((1, "class", "classes"), "1 class"),
        ((21, "class", "classes"), "21 classes"),
    ],
)
def test_a_count_has_its_plural_and_separators(arguments: tuple[int, str], text: str) -> None:
    assert format_count(*arguments) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.7, "0:42"), (727, "12:07"), (11100, "3:05:00")])
def test_a_duration_is_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
