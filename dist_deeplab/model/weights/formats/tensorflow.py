"""TensorFlow checkpoints without TensorFlow: DrSleep's `.ckpt`.

V2 is an index (a table of BundleEntryProto by name) and data files of raw tensors; V1, which DrSleep published, is one
table with everything in it (SavedTensorSlices). Written from the comments in tensorflow/core: tensor_bundle.proto and
saved_tensor_slice.proto. Checksums of blocks and tensors are verified.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_deeplab.errors import UserError
from dist_deeplab.model.batch_norm import EPS
from dist_deeplab.model.preprocessing import CAFFE
from dist_deeplab.model.weights.formats.caffe_names import LayerTensors, to_tensor
from dist_deeplab.model.weights.formats.crc32c import masked_crc32c
from dist_deeplab.model.weights.formats.kaffe import FAMILY, PARAMETERS, SLIM_EPS
from dist_deeplab.model.weights.formats.protobuf import Message
from dist_deeplab.model.weights.formats.sstable import MAGIC, read_table
from dist_deeplab.model.weights.variant import Damaged, Variant

_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # types.proto: DT_FLOAT, DOUBLE, INT32, INT64, HALF
_OPTIMIZER = ("Momentum", "Adam", "RMSProp", "ExponentialMovingAverage")

_Array = np.ndarray[Any, Any]


def bundle_index(path: Path) -> Path | None:
    """Return the index file of a V2 checkpoint given as `model.ckpt-20000`, `....index`, `....data-...` or `....meta`.

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
    """Return whether a file ends as a TensorFlow table does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - len(MAGIC)))
        return file.read() == MAGIC


def read_tensorflow(path: Path) -> LayerTensors:
    """Return the layers in a checkpoint; path: the index of a V2 checkpoint, or a V1 checkpoint.

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
    header = Message(value)
    if key != b"":
        raise Damaged("its first entry is no header")
    readers = _v1_tensors(header, entries) if _is_v1(header) else _v2_tensors(header, entries, path)
    names = dict(readers)
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
            skipped[name] = "state of the optimizer" if is_slot else "no part of our network"
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


def _is_v1(header: Message) -> bool:
    """Return whether field 1 is a message, as in V1's SavedTensorSlices, and no number, as in BundleHeaderProto."""
    try:
        return bool(header.views(1))
    except Damaged:
        return False


def _v2_tensors(
    header: Message, entries: Iterator[tuple[bytes, memoryview]], index: Path
) -> Iterator[tuple[str, Callable[[], _Array]]]:
    """Yield name and reader of each tensor of a bundle."""
    num_shards = header.integer(1)
    if header.integer(2) != 0:
        raise Damaged("it was written on a big-endian machine")
    if not 1 <= num_shards < 100_000:
        raise Damaged(f"it claims to have {num_shards:,} data files")
    stem = index.name.removesuffix(".index")
    for key, value in entries:
        entry = Message(value)
        shard = entry.integer(3)
        if shard >= num_shards:
            raise Damaged("a tensor is in a data file that does not exist")
        data = index.with_name(f"{stem}.data-{shard:05d}-of-{num_shards:05d}")
        yield _name(key), lambda entry=entry, data=data: _read_v2(entry, data)  # type: ignore[misc]


def _read_v2(entry: Message, data: Path) -> _Array:
    if 7 in entry:
        raise Damaged("it is stored in slices, which is not supported")
    dtype, shape = _dtype(entry.integer(1)), _shape(entry.message(2))
    offset, size = entry.integer(4), entry.integer(5)
    if size != _num_values(shape) * dtype.itemsize:
        raise Damaged(f"it is of shape {list(shape)} but has {size:,} bytes")
    if not data.is_file():
        raise Damaged(f"its data file {data.name} is not beside the index")
    if offset + size > data.stat().st_size:
        raise Damaged(f"it ends behind the end of {data.name}")
    with data.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size or entry.fixed32(6) != masked_crc32c(content):
        raise Damaged(f"its checksum in {data.name} is wrong")
    return np.frombuffer(content, dtype=dtype).reshape(shape)


def _v1_tensors(
    header: Message, entries: Iterator[tuple[bytes, memoryview]]
) -> Iterator[tuple[str, Callable[[], _Array]]]:
    """Yield name and reader of each tensor of a V1 checkpoint, whose header states the shapes."""
    meta = header.message(1)
    shapes = {}
    for tensor in meta.messages(1) if meta else []:
        shapes[tensor.text(1)] = (tensor, len(tensor.views(4)))
    for _, value in entries:
        content = Message(value).message(2)
        if content is None:
            raise Damaged("an entry holds no data")
        name = content.text(1)
        if name not in shapes:
            raise Damaged(f"{name[:80]!r} is not in its list of tensors")
        about, num_slices = shapes[name]
        yield name, lambda content=content, about=about, n=num_slices: _read_v1(content, about, n)  # type: ignore[misc]


def _read_v1(content: Message, about: Message, num_slices: int) -> _Array:
    if num_slices > 1:
        raise Damaged("it is stored in slices, which is not supported")
    dtype, shape = _dtype(about.integer(3)), _shape(about.message(2))
    data = content.message(3)
    if data is None or dtype.kind != "f" or dtype.itemsize == 2:
        raise Damaged("it holds no float values")
    values = data.floats(5, "<f4") if dtype.itemsize == 4 else data.floats(6, "<f8")
    if len(values) != _num_values(shape):
        raise Damaged(f"it is of shape {list(shape)} but has {len(values):,} values")
    return values.reshape(shape)


def _name(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise Damaged("a name is no text") from None


def _dtype(number: int) -> "np.dtype[Any]":
    if number not in _TYPES:
        raise Damaged(f"it is of the type {number}, not of numbers")
    return np.dtype(_TYPES[number])


def _shape(message: Message | None) -> tuple[int, ...]:
    dimensions = message.messages(2) if message else []
    shape = tuple(dimension.integer(1) for dimension in dimensions)
    if len(shape) > 8 or any(length >= 2**31 for length in shape):
        raise Damaged("its shape is no shape")
    return shape


def _num_values(shape: tuple[int, ...]) -> int:
    num = 1
    for length in shape:
        num *= length
    return num
