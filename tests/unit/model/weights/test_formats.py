"""The parts under the readers: checksums, tables, wire format; and layers of a .caffemodel that are not ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_deeplab.errors import UserError
from dist_deeplab.model.weights import load_weights
from dist_deeplab.model.weights.formats.caffe_names import place_of
from dist_deeplab.model.weights.formats.protobuf import message_types, numbers, parse, parse_all
from dist_deeplab.model.weights.formats.sstable import masked_crc32c, read_table
from dist_deeplab.model.weights.variant import Damaged
from tests.unit.model.weights import writers
from tests.unit.model.weights.networks import CaffeLayer, CaffeNetBuilder, drsleep_variables

BLOCKS, WIDTH = (1, 1, 2, 1), 2

# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 64, 1000])
def test_checksums_are_masked_as_tensorflow_does(length: int) -> None:
    content = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    assert masked_crc32c(memoryview(content)) == writers.masked(writers.crc32c(content))
    assert writers.crc32c(b"123456789") == 0xE3069283  # the polynomial's check value


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_block", [1, 3, 1000])
@pytest.mark.parametrize("restart_every", [1, 4, 1000])
def test_a_table_gives_its_entries_in_order(per_block: int, restart_every: int) -> None:
    entries = [(b"", b"header")] + [(f"res{i:03d}/weights".encode(), b"v" * i) for i in range(50)]
    table = writers.table(entries, per_block=per_block, restart_every=restart_every)
    assert [(key, bytes(value)) for key, value in read_table(memoryview(table))] == entries


def test_no_flipped_bit_changes_what_a_table_gives() -> None:
    entries = [(b"", b"header"), (b"conv1/weights", b"abc"), (b"conv1/weights/Momentum", b"def")]
    table = writers.table(entries)
    num_noticed = 0
    for position in range(len(table)):
        damaged = bytearray(table)
        damaged[position] ^= 0x10
        try:
            found = [(key, bytes(value)) for key, value in read_table(memoryview(damaged))]
            assert found == entries  # a byte that says nothing: padding, or of the empty block of meta blocks
        except Damaged:
            num_noticed += 1
    assert num_noticed > len(table) - 60


# --- protobuf ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def message() -> Any:
    return message_types({"Sample": {"ints": (1, "repeated int64"), "floats": (5, "repeated bytes")}})["Sample"]


def test_repeated_integers_are_read_packed_and_one_by_one(message: Any) -> None:
    packed = writers.chunk(1, b"".join(writers.varint(value) for value in (0, 127, 300, 2**62)))
    single = b"".join(writers.integer(1, value) for value in (0, 127, 300, 2**62))
    assert list(parse(message, packed).ints) == list(parse(message, single).ints) == [0, 127, 300, 2**62]


def test_packed_floats_are_read_in_one_piece_and_in_several(message: Any) -> None:
    first, second = (np.array(values, dtype="<f4").tobytes() for values in ([1.5, -2.0], [7]))
    assert numbers(parse(message, writers.chunk(5, first)).floats, "<f4").tolist() == [1.5, -2.0]
    both = parse(message, writers.chunk(5, first) + writers.chunk(5, second))
    assert numbers(both.floats, "<f4").tolist() == [1.5, -2.0, 7.0]
    with pytest.raises(Damaged, match="within a number"):
        numbers([b"123"], "<f4")


def test_messages_are_counted_before_they_are_parsed(message: Any) -> None:
    with pytest.raises(Damaged, match="it holds 3 messages where at most 2"):
        parse_all(message, [b"\x80"] * 3, at_most=2)


@pytest.mark.parametrize(
    "content",
    [b"\x80", b"\xff" * 11, b"\x0a\x05ab", b"\x0b", b"\x0c", b"\x07", b"\x00\x01", b"\x0d\x00\x00", b"\x09\x00"],
)
def test_bytes_that_are_not_a_message_are_refused(content: bytes, message: Any) -> None:
    with pytest.raises(Damaged):
        parse(message, content)


# --- layer names and parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("conv1", "backbone.conv1"),
        ("scale_conv1", "backbone.bn1"),
        ("res2a_branch1", "backbone.layer1.0.downsample.0"),
        ("bn2a_branch1", "backbone.layer1.0.downsample.1"),
        ("res3d_branch2b", "backbone.layer2.3.conv2"),
        ("res4b22_branch2c", "backbone.layer3.22.conv3"),
        ("scale4b1_branch2a", "backbone.layer3.1.bn1"),
        ("res5b_branch2a", "backbone.layer4.1.conv1"),
        ("fc1_voc12_c3", "head.branches.3"),
        ("fc1_coco_stuff_c0", "head.branches.0"),
        ("fc1_c2", "head.branches.2"),
    ],
)
def test_layers_of_the_authors_have_their_place(layer: str, module: str) -> None:
    place = place_of(layer)
    assert place is not None
    assert place.module == module


@pytest.mark.parametrize(
    "layer", ["fc1000", "res2a", "res4c3_branch2a", "fc1_voc12_res05_c1", "fc1_voc12_c4", "res6a_branch1"]
)
def test_other_layers_have_none(layer: str) -> None:
    assert place_of(layer) is None


def _change(name: str, **values: float) -> Callable[[list[CaffeLayer]], None]:
    def change(layers: list[CaffeLayer]) -> None:
        layer = next(layer for layer in layers if layer.name == name)
        for key, value in values.items():
            setattr(layer, key, value)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            _change("res4b_branch2b", dilation=3),
            r"res4b_branch2b has kernel 3, stride 1, pad 2, dilation 3; ours has .*dilation 2",
        ),
        (_change("res5a_branch2b", pad=2), "res5a_branch2b has .*pad 2.*ours has .*pad 4"),
        (_change("res3a_branch1", stride=1), "res3a_branch1 has .*stride 1.*ours has .*stride 2"),
        (_change("conv1", stride=1), "conv1 has kernel 7, stride 1.*ours has kernel 7, stride 2"),
        (_change("fc1_voc12_c2", dilation=12), "fc1_voc12_c2 has .*dilation 12.*ours has .*dilation 18"),
        (_change("res2a_branch2b", kernel=5), r"weights of shape \[2, 2, 3, 3\] for a convolution of kernel 5"),
        (_change("bn3a_branch2a", eps=1e-3), "bn3a_branch2a has eps 0.001; ours has 1e-05"),
        (_change("pool1", kernel=2), "pool1 has kind 0, kernel 2"),
    ],
)
def test_a_layer_of_another_geometry_is_named(
    tmp_path: Path, change: Callable[[list[CaffeLayer]], None], sentence: str
) -> None:
    layers = CaffeNetBuilder(BLOCKS, WIDTH, 3, seed=0).layers
    change(layers)
    (tmp_path / "a.caffemodel").write_bytes(writers.caffemodel(layers))
    with pytest.raises(UserError, match=sentence):
        load_weights(tmp_path / "a.caffemodel")


def test_statistics_that_were_never_collected_are_refused(tmp_path: Path) -> None:
    layers = CaffeNetBuilder(BLOCKS, WIDTH, 3, seed=0).layers
    next(layer for layer in layers if layer.name == "bn2a_branch2a").blobs[2][:] = 0
    (tmp_path / "a.caffemodel").write_bytes(writers.caffemodel(layers))
    with pytest.raises(UserError, match="layer bn2a_branch2a: the scale of its statistics is 0"):
        load_weights(tmp_path / "a.caffemodel")


def test_two_networks_in_a_checkpoint_and_other_networks_are_refused(tmp_path: Path) -> None:
    variables = drsleep_variables(BLOCKS, WIDTH, 3, seed=0)
    twice = {f"{scope}/{name}": value for scope in ("a", "b") for name, value in variables.items()}
    with pytest.raises(UserError, match="holds 2 networks, under 'a/', 'b/'"):
        load_weights(writers.write_bundle(twice, tmp_path / "two"))
    slim = {f"resnet_v1_101/{name}": value for name, value in {"conv1/kernel": np.zeros((7, 7, 3, 4))}.items()}
    with pytest.raises(UserError, match="of no known family"):
        load_weights(writers.write_bundle(slim, tmp_path / "slim"))
    scoped = {f"tower_0/{name}": value for name, value in variables.items()}
    assert "head.branches.3.bias" in load_weights(writers.write_bundle(scoped, tmp_path / "scoped")).tensors
