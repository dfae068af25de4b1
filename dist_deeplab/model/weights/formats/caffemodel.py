"""`.caffemodel` files without Caffe: caffe.proto's NetParameter, its layers in today's form (V2) or the old (V1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights.formats.caffe_geometry import (
    Convolution,
    check_batch_norm,
    check_pooling,
    recognise_geometry,
)
from dist_deeplab.model.weights.formats.caffe_names import LayerTensors, place_of, to_tensor, why_skipped
from dist_deeplab.model.weights.formats.protobuf import Message
from dist_deeplab.model.weights.variant import Damaged, Variant

FAMILY = "Caffe ResNet"


@dataclass(frozen=True)
class _Numbers:
    """Field numbers of a layer's message."""

    name: int
    blobs: int
    convolution: int
    pooling: int
    batch_norm: int
    data: tuple[int, ...]
    """Parameters of data layers whose field 1 is the list of images."""


_V2 = _Numbers(name=1, blobs=7, convolution=106, pooling=121, batch_norm=139, data=(107, 112, 115))  # LayerParameter
_V1 = _Numbers(name=4, blobs=6, convolution=10, pooling=19, batch_norm=0, data=(11, 13, 15))  # V1LayerParameter
_LAYER, _LAYERS = 100, 2  # NetParameter: V2 and V1
_MAX_LAYERS = 20_000


@dataclass(frozen=True)
class _Layer:
    message: Message
    numbers: _Numbers

    @property
    def name(self) -> str:
        return self.message.text(self.numbers.name)

    def parameter(self, number: int) -> Message | None:
        return self.message.message(number) if number else None

    def blobs(self) -> "list[np.ndarray[Any, Any]]":
        return [_blob(blob) for blob in self.message.messages(self.numbers.blobs)]


def read_caffemodel(path: Path) -> tuple[LayerTensors, str]:
    """Return the layers of a `.caffemodel`, and the list of images it was trained on as far as it tells.

    Raises:
        UserError: damaged, without weights, or of a network whose geometry is not ours (the first such layer is named).
    """
    try:
        layers = _layers(Message(memoryview(path.read_bytes())))
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        convolutions: dict[str, Convolution] = {}
        skipped: dict[str, str] = {}
        training_list = ""
        for layer in layers:
            name = layer.name
            for number in layer.numbers.data:
                parameter = layer.parameter(number)
                training_list = training_list or (parameter.text(1) if parameter else "")
            if name == "pool1":
                check_pooling(layer.parameter(layer.numbers.pooling), path)
            try:
                found = _parameters(layer, path)
            except Damaged as error:
                raise Damaged(f"layer {name}: {error}") from None
            place = place_of(name)
            if place is None:
                skipped |= {f"{name}/{key}": why_skipped(name) for key in found}
                continue
            tensors |= {f"{name}/{key}": value for key, value in found.items()}
            parameter = layer.parameter(layer.numbers.convolution)
            if place.kind != "norm" and found and parameter is not None:
                convolutions[name] = Convolution.read(parameter, found["weight"].shape)
        geometry = recognise_geometry(convolutions, path)
    except Damaged as error:
        raise UserError(f"{path} can't be read as a .caffemodel: {error}; is it whole?") from None
    variant = Variant(geometry.family, geometry.stride_on_1x1, CAFFE, geometry.contract_dilation)
    content = {name: to_tensor(value) for name, value in tensors.items()}
    return LayerTensors(FAMILY, content, EPS, variant, skipped=skipped), training_list


def looks_like_caffemodel(head: bytes) -> bool:
    """Return whether a file begins as a NetParameter does: with its name, an input, or a layer."""
    return head[:1] in (b"\x0a", b"\x12", b"\x1a") or head[:2] == b"\xa2\x06"


def _layers(net: Message) -> list[_Layer]:
    layers = [_Layer(message, _V2) for message in net.messages(_LAYER)]
    layers += [_Layer(message, _V1) for message in net.messages(_LAYERS)]
    if not layers or len(layers) > _MAX_LAYERS:
        raise Damaged("it has no layers" if not layers else f"it has over {_MAX_LAYERS:,} layers")
    return layers


def _parameters(layer: _Layer, path: Path) -> "dict[str, np.ndarray[Any, Any]]":
    """Return a layer's numbers by our names; a BatchNorm's are divided by their scale.

    By its place a layer says what it is: V1 has no type for batch norms, and forks have their own.
    """
    blobs, name = layer.blobs(), layer.name
    if not blobs:
        return {}
    place = place_of(name)
    if place is None:
        return {str(number): blob for number, blob in enumerate(blobs)}
    if place.kind != "norm":
        if len(blobs) > 2 or blobs[0].ndim != 4:
            raise Damaged(f"a convolution with {len(blobs)} blobs, the first of shape {list(blobs[0].shape)}")
        return {"weight": blobs[0]} | ({"bias": blobs[1].ravel()} if len(blobs) == 2 else {})
    if name.startswith("scale"):
        return {key: blob.ravel() for key, blob in zip(("gamma", "beta"), blobs, strict=False)}
    if len(blobs) != 3 or blobs[2].size != 1:
        raise Damaged(f"a BatchNorm with {len(blobs)} blobs, not mean, variance and their scale")
    check_batch_norm(name, layer.parameter(layer.numbers.batch_norm), path)
    scale = float(blobs[2].ravel()[0])
    if not 0 < scale < float("inf"):
        raise Damaged(f"the scale of its statistics is {scale:g}: they were never collected")
    return {"mean": blobs[0].ravel() / np.float32(scale), "variance": blobs[1].ravel() / np.float32(scale)}


def _blob(blob: Message) -> "np.ndarray[Any, Any]":
    """Return a BlobProto's array; old files give four sizes in place of a shape."""
    described = blob.message(7)
    shape = described.ints(1) if described else [blob.integer(number) for number in (1, 2, 3, 4)]
    values = blob.floats(5) if 5 in blob else blob.floats(8, "<f8")
    num = 1
    for length in shape:
        num *= length
    if len(shape) > 8 or num != len(values):
        raise Damaged(f"a blob of shape {shape[:8]} has {len(values):,} values")
    return values.reshape(shape)
