"""Windows cover an image evenly and blend to what one look at all of it gives, where the predictor is local."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.data.windows import Windows
from dist_deeplab.evaluation.sliding import sliding_probabilities


@given(st.integers(1, 500), st.integers(1, 90), st.data())
def test_windows_cover_an_axis_and_overlap_enough(length: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    starts = Windows(window, overlap).starts(length)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - window)
    assert all(0 < after - before <= window - overlap for before, after in itertools.pairwise(starts))


def _local(image: np.ndarray) -> np.ndarray:
    """A predictor that looks at each pixel alone: 3 classes."""
    values = image.astype(np.float32) + 1
    return np.moveaxis(values / values.sum(2, keepdims=True), 2, 0)


@pytest.mark.parametrize("size", [(100, 70), (33, 200), (20, 30), (64, 64), (131, 33)])
@pytest.mark.parametrize("overlap", [0, 10, 30])
def test_a_local_predictor_gives_the_same_in_windows(size: tuple[int, int], overlap: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    seen = []

    def predict(part: np.ndarray) -> np.ndarray:
        seen.append(part.shape[:2])
        return _local(part)

    strips = list(sliding_probabilities(predict, image, Windows(33, overlap)))
    np.testing.assert_allclose(np.concatenate(strips, axis=1), _local(image), rtol=1e-5)
    assert set(seen) == {(min(33, size[0]), min(33, size[1]))}
    assert max(strip.shape[1] for strip in strips) <= 33


def test_windows_that_disagree_are_blended_without_a_seam() -> None:
    answers = iter([0.0, 1.0])
    image = np.zeros((10, 30, 3), dtype=np.uint8)
    (strip,) = sliding_probabilities(
        lambda part: np.full((1, *part.shape[:2]), next(answers), dtype=np.float32), image, Windows(20, 10)
    )
    row = strip[0, 5]
    assert (row[:10] == 0).all()
    assert (row[20:] == 1).all()
    assert (np.diff(row) >= 0).all()
    assert np.diff(row).max() < 0.2
