"""Uploaded tensors are the given ones; that the copies overlap is for a GPU's trace to show."""

import torch

from dist_deeplab.training.device_copy import DeviceCopier


def test_tensors_arrive_in_order_with_their_values_and_memory_format() -> None:
    image = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8).to(memory_format=torch.channels_last)
    label = torch.arange(6)
    first, second = DeviceCopier(torch.device("cpu"))(image, label)
    assert torch.equal(first, image) and first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(second, label)
