"""TensorFlow checkpoints without TensorFlow: DrSleep's `.ckpt`.

V2 is an index (a table of BundleEntryProto by name) and data files of raw tensors; V1, which DrSleep published, is one
table with everything in it (SavedTensorSlices). Written from the comments in tensorflow/core: tensor_bundle.proto and
saved_tensor_slice.proto. Checksums of blocks and tensors are verified.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights.formats.caffe_names import LayerTensors, to_tensor
from dist_deeplab.model.weights.formats.kaffe import FAMILY, PARAMETERS, SLIM_EPS
from dist_deeplab.model.weights.formats.protobuf import message_types, numbers, parse, parse_all
from dist_deeplab.model.weights.formats.sstable import MAGIC, masked_crc32c, read_table
from dist_deeplab.model.weights.variant import Damaged, Variant

_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # types.proto: DT_FLOAT, DOUBLE, INT32, INT64, HALF
_OPTIMIZER = ("Momentum", "Adam", "RMSProp", "ExponentialMovingAverage")

_MAX_TENSORS = 20_000
_MAX_NAME = 512  # characters

_Array = np.ndarray[Any, Any]


@functools.cache
def _messages() -> dict[str, Any]:
    """The parts of tensor_bundle.proto, saved_tensor_slice.proto, tensor_shape.proto and tensor.proto that are read."""
    return message_types(
        {
            "BundleHeader": {"num_shards": (1, "int32"), "endianness": (2, "int32")},
            "BundleEntry": {
                "dtype": (1, "int32"),
                "shape": (2, "Shape"),
                "shard_id": (3, "int32"),
                "offset": (4, "int64"),
                "size": (5, "int64"),
                "crc32c": (6, "fixed32"),
                "slices": (7, "repeated bytes"),
            },
            "Shape": {"dim": (2, "repeated bytes")},
            "Dim": {"size": (1, "int64")},
            "SavedTensorSlices": {"meta": (1, "Meta"), "data": (2, "Slice")},
            "Meta": {"tensor": (1, "repeated bytes")},
            "SliceMeta": {
                "name": (1, "bytes"),
                "shape": (2, "Shape"),
                "type": (3, "int32"),
                "slice": (4, "repeated bytes"),
            },
            "Slice": {"name": (1, "bytes"), "data": (3, "Tensor")},
            "Tensor": {"floats": (5, "repeated bytes"), "doubles": (6, "repeated bytes")},
        }
    )


def bundle_index(path: Path) -> Path | None:
    """Index file of a V2 checkpoint given as `model.ckpt-20000`, `....index`, `....data-...` or `....meta`.

    Raises:
        UserError: one of its other files is given and there is no index.
    """
    if path.name.endswith(".index"):
        return path
    stem = re.sub(r"\.(data-\d{5}-of-\d{5}|meta)$", "", path.name)
    index = path.with_name(f"{stem}.index")
    if stem != path.name and not index.is_file():
        raise UserError(f"{path} is one of the files of a TensorFlow checkpoint; put {index.name} beside it")
    return index if index.is_file() and (stem != path.name or not path.exists()) else None


def is_table(path: Path) -> bool:
    """Whether a file ends as a TensorFlow table does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - len(MAGIC)))
        return file.read() == MAGIC


def read_tensorflow(path: Path) -> LayerTensors:
    """The layers in a checkpoint; path: the index of a V2 checkpoint, or a V1 checkpoint.

    Raises:
        UserError: damaged, incomplete, or not of DrSleep's network.
    """
    try:
        return _read(path)
    except Damaged as error:
        raise UserError(f"{path} can't be read as a TensorFlow checkpoint: {error}; is it whole?") from None
    except OSError as error:
        raise UserError(f"{error.filename or path} can't be read: {error.strerror}") from None


def _read(path: Path) -> LayerTensors:
    entries = read_table(memoryview(path.read_bytes()))
    key, value = next(entries, (b"-", memoryview(b"")))
    if key != b"":
        raise Damaged("its first entry is not a header")
    saved = parse(_messages()["SavedTensorSlices"], value)
    is_v1 = saved.HasField("meta")  # in a BundleHeader field 1 is a number
    names = dict(_v1_tensors(saved.meta, entries) if is_v1 else _v2_tensors(value, entries, path))
    prefixes = sorted({name.removesuffix("conv1/weights") for name in names if re.search(r"(^|/)conv1/weights$", name)})
    if len(prefixes) > 1:
        raise UserError(
            f"{path} holds {len(prefixes)} networks, under {', '.join(repr(p) for p in prefixes[:5])}; keep one of them"
        )
    if not prefixes:
        raise UserError(
            f"the weights in {path} are of no known family; of TensorFlow's, DrSleep's DeepLab-v2 is known, whose "
            f"first layer is conv1/weights; its names begin with {', '.join(list(names)[:3])}"
        )
    tensors, sources, skipped, is_slim = {}, {}, {}, False
    for name, read in names.items():
        layer, _, parameter = name.removeprefix(prefixes[0]).rpartition("/")
        if not name.startswith(prefixes[0]) or parameter not in PARAMETERS or "/" in layer:
            is_slot = any(parameter.startswith(slot) for slot in _OPTIMIZER)
            skipped[name] = "state of the optimizer" if is_slot else "not part of our network"
            continue
        is_slim |= parameter == "moving_variance"
        try:
            values = read()
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from None
        target = f"{layer}/{PARAMETERS[parameter]}"
        tensors[target], sources[target] = to_tensor(values, is_hwio=parameter == "weights"), name
    variant = Variant(f"{FAMILY} (TensorFlow)", True, CAFFE)
    return LayerTensors(FAMILY, tensors, SLIM_EPS if is_slim else EPS, variant, sources, skipped)


def _v2_tensors(
    header_bytes: memoryview, entries: Iterator[tuple[bytes, memoryview]], index: Path
) -> Iterator[tuple[str, Callable[[], _Array]]]:
    """Name and reader of each tensor of a bundle.

    Raises:
        Damaged: also where entries share the bytes of their data file, and so would take more memory than its size.
    """
    header = parse(_messages()["BundleHeader"], header_bytes)
    if header.endianness != 0:
        raise Damaged("it was written on a big-endian machine")
    if not 1 <= header.num_shards < 100_000:
        raise Damaged(f"it claims to have {header.num_shards:,} data files")
    stem = index.name.removesuffix(".index")
    num_bytes: dict[Path, int] = {}
    for key, value in entries:
        entry = parse(_messages()["BundleEntry"], value)
        if not 0 <= entry.shard_id < header.num_shards:
            raise Damaged("a tensor is in a data file that does not exist")
        data = index.with_name(f"{stem}.data-{entry.shard_id:05d}-of-{header.num_shards:05d}")
        num_bytes[data] = num_bytes.get(data, 0) + max(0, entry.size)
        if data.is_file() and num_bytes[data] > data.stat().st_size:
            raise Damaged(f"its tensors are larger than {data.name}")
        yield _text(key), functools.partial(_read_v2, entry, data)


def _read_v2(entry: Any, data: Path) -> _Array:
    if entry.slices:
        raise Damaged("it is stored in slices, which is not supported")
    dtype, shape = _dtype(entry.dtype), _shape(entry)
    if entry.size != math.prod(shape) * dtype.itemsize:
        raise Damaged(f"it is of shape {list(shape)} but has {entry.size:,} bytes")
    if not data.is_file():
        raise Damaged(f"its data file {data.name} is not beside the index")
    if entry.offset < 0 or entry.offset + entry.size > data.stat().st_size:
        raise Damaged(f"it lies outside of {data.name}")
    with data.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.size)
    if len(content) != entry.size or entry.crc32c != masked_crc32c(content):
        raise Damaged(f"its checksum in {data.name} is wrong")
    return np.frombuffer(content, dtype=dtype).reshape(shape)


def _v1_tensors(meta: Any, entries: Iterator[tuple[bytes, memoryview]]) -> Iterator[tuple[str, Callable[[], _Array]]]:
    """Name and reader of each tensor of a V1 checkpoint, whose header states the shapes."""
    listed = parse_all(_messages()["SliceMeta"], meta.tensor, at_most=_MAX_TENSORS)
    shapes = {_text(tensor.name): tensor for tensor in listed}
    for _, value in entries:
        entry = parse(_messages()["SavedTensorSlices"], value)
        if not entry.HasField("data"):
            raise Damaged("an entry holds no data")
        name = _text(entry.data.name)
        if name not in shapes:
            raise Damaged(f"{name[:80]!r} is not in its list of tensors")
        yield name, functools.partial(_read_v1, entry.data.data, shapes[name])


def _read_v1(content: Any, about: Any) -> _Array:
    if len(about.slice) > 1:
        raise Damaged("it is stored in slices, which is not supported")
    dtype, shape = _dtype(about.type), _shape(about)
    if dtype.kind != "f" or dtype.itemsize == 2:
        raise Damaged("it holds no float values")
    values = numbers(content.floats, "<f4") if dtype.itemsize == 4 else numbers(content.doubles, "<f8")
    if len(values) != math.prod(shape):
        raise Damaged(f"it is of shape {list(shape)} but has {format_count(len(values), 'value')}")
    return values.reshape(shape)


def _text(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if not 0 < len(text) <= _MAX_NAME:
        raise Damaged(f"a name is not text of at most {_MAX_NAME} characters")
    return text


def _dtype(number: int) -> "np.dtype[Any]":
    if number not in _TYPES:
        raise Damaged(f"it is of the type {number}, not of numbers")
    return np.dtype(_TYPES[number])


def _shape(message: Any) -> tuple[int, ...]:
    """Shape in a message's field `shape`: at most 8 axes."""
    shape = tuple(dim.size for dim in parse_all(_messages()["Dim"], message.shape.dim, at_most=8))
    if any(not 0 <= length < 2**31 for length in shape):
        raise Damaged(f"it has the impossible shape {list(shape)}")
    return shape
