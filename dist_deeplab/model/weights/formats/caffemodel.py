"""`.caffemodel` files without Caffe: caffe.proto's NetParameter, its layers in today's form (V2) or the old (V1)."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights.formats.caffe_geometry import (
    Convolution,
    check_batch_norm,
    check_pooling,
    recognise_geometry,
)
from dist_deeplab.model.weights.formats.caffe_names import LayerTensors, place_of, to_tensor, why_skipped
from dist_deeplab.model.weights.formats.protobuf import Field, message_types, numbers, parse, parse_all
from dist_deeplab.model.weights.variant import Damaged, Variant

FAMILY = "Caffe ResNet"
_MAX_LAYERS = 20_000
_MAX_BLOBS = 16  # of a layer
_MAX_NAME = 256  # characters


@functools.cache
def _types() -> dict[str, Any]:
    """The parts of caffe.proto that are read. V1 has no parameters of batch norms."""

    def size(number: int) -> Field:
        return (number, "repeated uint32")

    def layer(name: int, blobs: int, convolution: int, pooling: int, lists: tuple[int, ...]) -> dict[str, Field]:
        """Fields of a layer; `lists`: parameters of data layers, whose field 1 is the list of images."""
        return {
            "name": (name, "string"),
            "blobs": (blobs, "repeated bytes"),
            "convolution": (convolution, "Convolution"),
            "pooling": (pooling, "Pooling"),
            **{f"data_{number}": (number, "Data") for number in lists},
        }

    axes = ("pad_h", "pad_w", "kernel_h", "kernel_w", "stride_h", "stride_w")
    return message_types(
        {
            "Net": {"layers": (2, "repeated bytes"), "layer": (100, "repeated bytes")},
            "Layer": layer(1, 7, 106, 121, (107, 112, 115)) | {"batch_norm": (139, "BatchNorm")},
            "LayerV1": layer(4, 6, 10, 19, (11, 13, 15)),
            "Blob": {
                **{name: (i, "int32") for i, name in enumerate(("num", "channels", "height", "width"), start=1)},
                "floats": (5, "repeated bytes"),
                "shape": (7, "Shape"),
                "doubles": (8, "repeated bytes"),
            },
            "Shape": {"dim": (1, "repeated int64")},
            "Convolution": {
                "num_output": (1, "uint32"),
                "group": (5, "uint32", 1),
                **{"pad": size(3), "kernel": size(4), "stride": size(6), "dilation": size(18)},
                **{name: (number, "uint32") for number, name in enumerate(axes, start=9)},
            },
            "Pooling": {
                "kind": (1, "int32"),
                "kernel": (2, "uint32"),
                "stride": (3, "uint32", 1),
                "pad": (4, "uint32"),
            },
            "BatchNorm": {"eps": (3, "float", "1e-5")},
            "Data": {"source": (1, "bytes")},
        }
    )


def read_caffemodel(path: Path) -> tuple[LayerTensors, str]:
    """The layers of a `.caffemodel`, and the list of images it was trained on as far as it names one.

    Raises:
        UserError: damaged, without weights, or of a network whose geometry is not ours (the first such layer is named).
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    convolutions: dict[str, Convolution] = {}
    skipped: dict[str, str] = {}
    training_list = ""
    try:
        for layer in _layers(path):
            for field, value in layer.ListFields():
                if field.name.startswith("data_"):
                    training_list = training_list or value.source.decode(errors="replace")
            if layer.name == "pool1":
                check_pooling(layer, path)
            try:
                found = _parameters(layer, path)
            except Damaged as error:
                raise Damaged(f"layer {layer.name}: {error}") from None
            place = place_of(layer.name)
            if place is None:
                skipped |= {f"{layer.name}/{key}": why_skipped(layer.name) for key in found}
                continue
            tensors |= {f"{layer.name}/{key}": value for key, value in found.items()}
            if place.kind != "norm" and found and layer.HasField("convolution"):
                convolutions[layer.name] = Convolution.read(layer.convolution, found["weight"].shape)
        geometry = recognise_geometry(convolutions, path)
    except Damaged as error:
        raise UserError(f"{path} can't be read as a .caffemodel: {error}; is it whole?") from None
    variant = Variant(geometry.family, geometry.stride_on_1x1, CAFFE, geometry.contract_dilation)
    content = {name: to_tensor(value) for name, value in tensors.items()}
    return LayerTensors(FAMILY, content, EPS, variant, skipped=skipped), training_list


def looks_like_caffemodel(head: bytes) -> bool:
    """Whether a file begins as a NetParameter does: with its name, an input, or a layer."""
    return head[:1] in (b"\x0a", b"\x12", b"\x1a") or head[:2] == b"\xa2\x06"


def _layers(path: Path) -> list[Any]:
    types = _types()
    net = parse(types["Net"], path.read_bytes())
    layers = parse_all(types["Layer"], net.layer, at_most=_MAX_LAYERS)
    layers += parse_all(types["LayerV1"], net.layers, at_most=_MAX_LAYERS)
    if not layers:
        raise Damaged("it has no layers")
    # upb gives bytes where a string is not UTF-8.
    if any(not isinstance(layer.name, str) or len(layer.name) > _MAX_NAME for layer in layers):
        raise Damaged(f"a layer's name is not text of at most {_MAX_NAME} characters")
    return layers


def _parameters(layer: Any, path: Path) -> "dict[str, np.ndarray[Any, Any]]":
    """A layer's numbers by our names; a BatchNorm's are divided by their scale.

    What a layer is follows from its place: V1 has no type for batch norms, and forks have their own.
    """
    blobs, name = [_array(blob) for blob in parse_all(_types()["Blob"], layer.blobs, at_most=_MAX_BLOBS)], layer.name
    if not blobs:
        return {}
    place = place_of(name)
    if place is None:
        return {str(number): blob for number, blob in enumerate(blobs)}
    if place.kind != "norm":
        if len(blobs) > 2 or blobs[0].ndim != 4:
            raise Damaged(
                f"a convolution with {format_count(len(blobs), 'blob')}, the first of shape {list(blobs[0].shape)}"
            )
        return {"weight": blobs[0]} | ({"bias": blobs[1].ravel()} if len(blobs) == 2 else {})
    if name.startswith("scale"):
        return {key: blob.ravel() for key, blob in zip(("gamma", "beta"), blobs, strict=False)}
    if len(blobs) != 3 or blobs[2].size != 1:
        raise Damaged(f"a BatchNorm with {format_count(len(blobs), 'blob')}, not mean, variance and their scale")
    check_batch_norm(layer, path)
    scale = float(blobs[2].ravel()[0])
    if not 0 < scale < float("inf"):
        raise Damaged(f"the scale of its statistics is {scale:g}: they were never collected")
    return {"mean": blobs[0].ravel() / np.float32(scale), "variance": blobs[1].ravel() / np.float32(scale)}


def _array(blob: Any) -> "np.ndarray[Any, Any]":
    """A BlobProto's array; old files give four sizes in place of a shape."""
    shape = list(blob.shape.dim) if blob.HasField("shape") else [blob.num, blob.channels, blob.height, blob.width]
    values = numbers(blob.floats, "<f4") if blob.floats else numbers(blob.doubles, "<f8")
    # The number of axes comes first: a product of a million of them takes quadratic time.
    if len(shape) > 8 or min(shape, default=0) < 0 or math.prod(shape) != len(values):
        raise Damaged(f"a blob of shape {shape[:8]} has {format_count(len(values), 'value')}")
    return values.reshape(shape)
