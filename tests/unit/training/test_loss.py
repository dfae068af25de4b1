"""The loss is a sum over valid pixels of the label seen where the logits sit."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_deeplab.training.loss import CrossEntropy, balanced_weights, cross_entropy_sum, num_valid, sample_label

IGNORE = 255


def _label(*shape: int, num_classes: int = 21, void_share: float = 0.2, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, num_classes, shape, dtype=np.uint8)
    label[rng.random(shape) < void_share] = IGNORE
    return torch.from_numpy(label)


# --- the label on the logits' grid ------------------------------------------------------------------------------------


def test_the_label_of_a_321_crops_logits_is_every_8th_pixel() -> None:
    label = _label(2, 321, 321)
    sampled = sample_label(label, (41, 41))
    assert sampled.dtype == torch.int64
    assert torch.equal(sampled, label[:, ::8, ::8].long())


@pytest.mark.quick("P7")
@given(rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_sizes_of_8k_plus_1_have_no_drift(rows: int, columns: int) -> None:
    label = _label(1, 8 * rows + 1, 8 * columns + 1)
    assert torch.equal(sample_label(label, (rows + 1, columns + 1)), label[:, ::8, ::8].long())


@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), grid=st.tuples(st.integers(1, 25), st.integers(1, 25)))
def test_sampling_is_corner_aligned_nearest(size: tuple[int, int], grid: tuple[int, int]) -> None:
    label = _label(2, *size)
    sampled = sample_label(label, grid)
    assert sampled.shape == (2, *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = Fraction(i * (size[0] - 1), max(1, grid[0] - 1))
            x = Fraction(j * (size[1] - 1), max(1, grid[1] - 1))
            nearest = label[:, int(y + Fraction(1, 2)), int(x + Fraction(1, 2))]  # int() floors: both are >= 0
            assert torch.equal(sampled[:, i, j], nearest.long())


def test_sampling_invents_no_class() -> None:
    label = torch.full((1, 33, 33), 3, dtype=torch.uint8)
    label[:, :, 16:] = IGNORE
    assert set(sample_label(label, (5, 7)).unique().tolist()) == {3, IGNORE}


def test_num_valid_counts_all_but_void() -> None:
    label = torch.tensor([[[0, 255, 20], [255, 255, 1]]])
    assert num_valid(label, IGNORE) == 3
    assert num_valid(label, 20) == 5
    assert num_valid(torch.full((2, 3, 3), IGNORE), IGNORE) == 0


# --- cross-entropy ----------------------------------------------------------------------------------------------------


def _slow_cross_entropy_sum(logits: np.ndarray, label: np.ndarray, ignore_label: int) -> float:
    total = 0.0
    for b, i, j in np.ndindex(label.shape):
        if label[b, i, j] != ignore_label:
            z = logits[b, :, i, j].astype(np.float64)
            largest = z.max()
            total += largest + np.log(np.exp(z - largest).sum()) - z[label[b, i, j]]
    return total


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 5), st.integers(1, 5)),
    void_share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    size=st.sampled_from([0.1, 3.0, 200.0]),
    seed=st.integers(0, 1000),
)
def test_cross_entropy_sum_equals_the_slow_reference(
    shape: tuple[int, int, int, int], void_share: float, size: float, seed: int
) -> None:
    logits = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    label = _label(shape[0], *shape[2:], num_classes=shape[1], void_share=void_share, seed=seed).long()
    loss = cross_entropy_sum(logits, label, IGNORE)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    expected = _slow_cross_entropy_sum(logits.numpy(), label.numpy(), IGNORE)
    assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("void", [255, 3])
def test_all_void_has_loss_and_gradient_exactly_0(void: int) -> None:
    logits = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cross_entropy_sum(logits, torch.full((2, 3, 3), void), void)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_void_pixels_get_no_gradient_and_the_others_prob_minus_one_hot() -> None:
    logits = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.tensor([[[1, IGNORE], [3, 0]]])
    cross_entropy_sum(logits, label, IGNORE).backward()
    prob = logits.detach().exp() / logits.detach().exp().sum(1, keepdim=True)
    expected = prob.clone()
    for i, j in np.ndindex(2, 2):
        if label[0, i, j] == IGNORE:
            expected[0, :, i, j] = 0
        else:
            expected[0, label[0, i, j], i, j] -= 1
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_are_widened_before_the_sum(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 21, 41, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    label = _label(2, 41, 41).long()
    loss = cross_entropy_sum(logits, label, IGNORE)
    assert loss.dtype == torch.float32
    expected = _slow_cross_entropy_sum(logits.float().numpy(), label.numpy(), IGNORE)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.quick("P7")
def test_loss_and_gradient_are_torchs_cross_entropy() -> None:
    logits = (5 * torch.randn(2, 21, 41, 41, generator=torch.Generator().manual_seed(0))).requires_grad_()
    other = logits.detach().clone().requires_grad_()
    label = _label(2, 41, 41).long()
    ours = cross_entropy_sum(logits, label, IGNORE)
    torchs = torch.nn.functional.cross_entropy(other, label, ignore_index=IGNORE, reduction="sum")
    ours.backward()
    torchs.backward()
    assert ours.item() == pytest.approx(torchs.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-5, atol=1e-7)


# --- weights of pixels ------------------------------------------------------------------------------------------------


def _weighted_mean(loss: CrossEntropy, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """What a step of one micro-batch computes."""
    weight = loss.weigh(label)
    return cross_entropy_sum(logits, label, loss.ignore_label, weight) / (loss.divisor([label], [weight]) or 1.0)


def test_class_weights_are_torchs() -> None:
    logits = (3 * torch.randn(4, 5, 9, 9, generator=torch.Generator().manual_seed(0))).requires_grad_()
    other = logits.detach().clone().requires_grad_()
    label = _label(4, 9, 9, num_classes=5).long()
    weights = (0.5, 3.0, 1.0, 0.0, 7.25)
    ours = _weighted_mean(CrossEntropy(IGNORE, weights), logits, label)
    torchs = torch.nn.functional.cross_entropy(other, label, weight=torch.tensor(weights), ignore_index=IGNORE)
    ours.backward()
    torchs.backward()
    assert ours.item() == pytest.approx(torchs.item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weights", [(), (0.5, 3.0, 1.0, 0.0, 7.25)])
def test_the_average_of_images_is_the_mean_of_their_own_means(weights: tuple[float, ...]) -> None:
    logits = 3 * torch.randn(3, 5, 9, 9, generator=torch.Generator().manual_seed(0))
    label = _label(3, 9, 9, num_classes=5).long()
    label[0, 2:] = IGNORE
    label[1] = IGNORE  # all void: it adds 0, and counts as an image
    by_class = torch.tensor(weights) if weights else None
    own = [
        torch.nn.functional.cross_entropy(logits[i : i + 1], label[i : i + 1], weight=by_class, ignore_index=IGNORE)
        for i in (0, 2)
    ]
    got = _weighted_mean(CrossEntropy(IGNORE, weights, "images"), logits, label)
    assert got.item() == pytest.approx(sum(loss.item() for loss in own) / 3, rel=1e-6)


def test_equal_class_weights_of_any_size_are_none() -> None:
    logits, label = torch.randn(2, 5, 9, 9), _label(2, 9, 9, num_classes=5).long()
    plain = cross_entropy_sum(logits, label, IGNORE) / num_valid(label, IGNORE)
    assert _weighted_mean(CrossEntropy(IGNORE, (0.3,) * 5), logits, label).item() == pytest.approx(
        plain.item(), rel=1e-6
    )


def test_a_void_label_among_the_classes_has_no_weight() -> None:
    loss = CrossEntropy(1, (2.0, 3.0, 4.0))
    assert loss.weigh(torch.tensor([[[0, 1, 2]]])).tolist() == [[[2.0, 0.0, 4.0]]]


def test_no_images_and_all_void_have_loss_0() -> None:
    for loss in (CrossEntropy(IGNORE, (1.0, 2.0)), CrossEntropy(IGNORE, average="images")):
        for images in (0, 2):
            void = torch.full((images, 3, 3), IGNORE)
            assert _weighted_mean(loss, torch.randn(images, 2, 3, 3), void).item() == 0.0


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=30).filter(any))
def test_balanced_weights_give_all_classes_that_are_there_the_same_sum(pixels: list[int]) -> None:
    weights = balanced_weights(pixels)
    sums = [count * weight for count, weight in zip(pixels, weights, strict=True) if count]
    assert sums == pytest.approx([sum(pixels) / len(sums)] * len(sums), rel=1e-5)


def test_balanced_weights_of_three_classes() -> None:
    assert balanced_weights([600, 300, 0, 100]) == (0.555556, 1.11111, 1.0, 3.33333)
