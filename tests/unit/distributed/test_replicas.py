"""A checksum sees any change of any element, in any memory format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_deeplab.distributed import replicas
from dist_deeplab.distributed.replicas import check_replicas, checksum, digest
from dist_deeplab.errors import TrainingError


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64]))
def test_a_checksum_changes_with_any_bit_of_any_element(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    changed = tensor.clone()
    place = data.draw(st.integers(0, 23))
    bits = changed.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits[place] ^= 1 << data.draw(st.integers(0, 8 * tensor.element_size() - 2))
    assert int(checksum(changed)) != int(checksum(tensor))


def test_a_checksum_sees_two_values_that_changed_places() -> None:
    tensor = torch.randn(10, generator=torch.Generator().manual_seed(0))
    assert int(checksum(tensor)) != int(checksum(tensor.flip(0)))


def test_a_checksum_does_not_depend_on_the_memory_format_and_knows_scalars() -> None:
    tensor = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert int(checksum(tensor.to(memory_format=torch.channels_last))) == int(checksum(tensor))
    assert int(checksum(torch.tensor(7))) == 7


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))


def _check_among(
    others: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch, *, buffers: bool = True
) -> list[object]:
    """Check `_net()` as rank 0 among other ranks' networks; what it has sent to them."""
    sent: list[object] = []

    def gather(own: object) -> list[object]:
        sent.append(own)
        rest: list[object] = []
        for other in others:
            tensors = dict(replicas._tensors(other, buffers=buffers))
            content = list(tensors), [int(checksum(tensor)) for tensor in tensors.values()]
            rest.append(digest(*content) if isinstance(own, str) else content)
        return [own, *rest]

    monkeypatch.setattr(replicas, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(replicas, "gather_to_all", gather)
    check_replicas(_net(), buffers=buffers, when="at step 7")
    return sent


def test_equal_ranks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    [sent] = _check_among([_net(), _net()], monkeypatch)
    assert len(str(sent)) == 16, "more would travel between all ranks"


@pytest.mark.parametrize("odd_one", [1, 2])
def test_the_rank_and_the_tensor_that_differ_are_named(odd_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [_net() for _ in range(3)]
    with torch.no_grad():
        others[odd_one - 1][0].bias[1] += 1e-6
    with pytest.raises(TrainingError, match=rf"^rank {odd_one} of 4 holds other .* in 0\.bias at step 7"):
        _check_among(others, monkeypatch)


def test_the_main_rank_may_be_the_odd_one(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [_net() for _ in range(3)]
    for other in others:
        torch.nn.init.zeros_(other[0].bias)
    with pytest.raises(TrainingError, match=r"^rank 0 of 4 holds .* in 0\.bias at"):
        _check_among(others, monkeypatch)


def test_of_many_tensors_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    for tensor in other.state_dict().values():
        tensor.add_(1)
    with pytest.raises(TrainingError, match=r"in 0\.weight, 0\.bias, 1\.weight and 4 more tensors at step 7"):
        _check_among([other], monkeypatch)


def test_statistics_of_their_own_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _net()
    other[1].running_mean += 1
    with pytest.raises(TrainingError, match=r"1\.running_mean"):
        _check_among([other], monkeypatch)
    _check_among([other], monkeypatch, buffers=False)
