"""What the network gets to see: channel order, mean, deviation, and padding that is exactly the mean."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_deeplab.model.preprocessing import CAFFE, TORCHVISION, Preprocessing


def _slow_normalize(image: np.ndarray, preprocessing: Preprocessing, content: tuple[int, int]) -> np.ndarray:
    """One image uint8 [3, H, W], pixel by pixel."""
    out = np.zeros(image.shape)
    order = [2, 1, 0] if preprocessing.channels == "bgr" else [0, 1, 2]
    for channel, source in enumerate(order):
        for y in range(content[0]):
            for x in range(content[1]):
                value = (float(image[source, y, x]) - preprocessing.mean[channel]) / preprocessing.std[channel]
                out[channel, y, x] = value
    return out


@pytest.mark.parametrize("preprocessing", [CAFFE, TORCHVISION])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_normalize_equals_the_slow_reference(preprocessing: Preprocessing, data: st.DataObject) -> None:
    sizes = st.tuples(st.integers(0, 6), st.integers(0, 5))
    contents = data.draw(st.lists(sizes, min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    image = np.random.default_rng(seed).integers(0, 256, (len(contents), 3, 6, 5), dtype=np.uint8)
    result = preprocessing.normalize(torch.from_numpy(image), torch.tensor(contents))
    assert result.dtype == torch.float32
    expected = np.stack([_slow_normalize(one, preprocessing, content) for one, content in zip(image, contents)])
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("preprocessing", [CAFFE, TORCHVISION])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_padding_is_exactly_zero_whatever_lies_there(preprocessing: Preprocessing, value: int) -> None:
    image = torch.full((2, 3, 9, 17), value, dtype=torch.uint8)
    result = preprocessing.normalize(image, torch.tensor([[4, 17], [9, 11]]))
    assert torch.count_nonzero(result[0, :, 4:]) == 0
    assert torch.count_nonzero(result[1, :, :, 11:]) == 0
    assert torch.count_nonzero(result[0, :, :4]) == 3 * 4 * 17
    assert torch.count_nonzero(result[1, :, :, :11]) == 3 * 9 * 11


def test_caffe_weights_see_bgr_minus_the_mean_without_deviation() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    result = CAFFE.normalize(red, torch.tensor([[1, 1]])).flatten().tolist()
    assert result == pytest.approx([-104.00698793, -116.66876762, 255 - 122.67891434], rel=1e-6)


def test_torchvision_weights_see_rgb_with_imagenet_mean_and_deviation() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    result = TORCHVISION.normalize(red, torch.tensor([[1, 1]])).flatten().tolist()
    # torchvision: ToTensor, then Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert result == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)


def test_normalize_leaves_its_input_alone() -> None:
    image = torch.randint(0, 256, (1, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    CAFFE.normalize(image, torch.tensor([[2, 2]]))
    assert torch.equal(image, before)
