"""Files of other people's formats, written from first principles: Caffe's protobuf, kaffe's .npy, TensorFlow's tables.

Reference code, slow and obvious; it shares nothing with the readers of the package.
"""

import struct
from pathlib import Path

import numpy as np

from tests.unit.model.weights.networks import Arrays, CaffeLayer

# --- Protocol Buffers -------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def chunk(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def text(number: int, value: str) -> bytes:
    return chunk(number, value.encode())


def float32(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


# --- Caffe ------------------------------------------------------------------------------------------------------------


def blob(values: np.ndarray, *, old: bool) -> bytes:
    """BlobProto; `old`: four sizes instead of a shape."""
    if old:
        sizes = [1] * (4 - values.ndim) + list(values.shape)
        shape = b"".join(integer(number, size) for number, size in zip((1, 2, 3, 4), sizes, strict=True))
    else:
        shape = chunk(7, chunk(1, b"".join(varint(size) for size in values.shape)))
    return shape + chunk(5, values.astype("<f4").tobytes())


def caffe_layer(layer: CaffeLayer, *, v1: bool) -> bytes:
    """A LayerParameter, or a V1LayerParameter, which has no parameters of batch norms."""
    is_conv, is_bn, is_pool = (layer.type == kind for kind in ("Convolution", "BatchNorm", "Pooling"))
    convolution = b""
    if is_conv:
        convolution = integer(1, layer.blobs[0].shape[0]) + integer(2, int(len(layer.blobs) > 1))
        convolution += integer(3, layer.pad) + integer(4, layer.kernel) + integer(6, layer.stride)
        convolution += integer(18, layer.dilation) if layer.dilation != 1 else b""
    pooling = integer(1, 0) + integer(2, layer.kernel) + integer(3, layer.stride) + integer(4, layer.pad)
    blobs = [blob(values, old=v1) for values in layer.blobs]
    if v1:
        kinds = {"Convolution": 4, "Pooling": 17, "ReLU": 18, "Eltwise": 25}
        out = b"".join(text(2, name) for name in layer.bottom) + text(3, layer.top) + text(4, layer.name)
        out += integer(5, kinds.get(layer.type, 0)) + b"".join(chunk(6, content) for content in blobs)
        return out + (chunk(10, convolution) if is_conv else b"") + (chunk(19, pooling) if is_pool else b"")
    out = text(1, layer.name) + text(2, layer.type) + b"".join(text(3, name) for name in layer.bottom)
    out += text(4, layer.top) + b"".join(chunk(7, content) for content in blobs)
    out += chunk(106, convolution) if is_conv else b""
    out += chunk(121, pooling) if is_pool else b""
    return out + (chunk(139, integer(1, 1) + float32(3, layer.eps)) if is_bn and layer.eps != 1e-5 else b"")


def caffemodel(layers: list[CaffeLayer], *, v1: bool = False, training_list: str = "") -> bytes:
    """A NetParameter, with a data layer where a list of images is given."""
    net = text(1, "deeplab")
    if training_list:
        source = text(1, training_list)
        net += chunk(2, text(4, "data") + chunk(15, source)) if v1 else chunk(100, text(1, "data") + chunk(115, source))
    return net + b"".join(chunk(2 if v1 else 100, caffe_layer(layer, v1=v1)) for layer in layers)


# --- kaffe ------------------------------------------------------------------------------------------------------------

ORIGINAL_KAFFE = {"gamma": "scale", "beta": "offset", "moving_mean": "mean", "moving_variance": "variance"}


def kaffe_dictionary(variables: Arrays, renamed: dict[str, str] | None = None) -> dict[str, Arrays]:
    """{layer: {parameter: array}}, with parameters as caffe-tensorflow called them first where `renamed` says so."""
    layers: dict[str, Arrays] = {}
    for name, values in variables.items():
        layer, parameter = name.split("/")
        layers.setdefault(layer, {})[(renamed or {}).get(parameter, parameter)] = values
    return layers


# --- TensorFlow -------------------------------------------------------------------------------------------------------


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC_TABLE = _crc_table()


def crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def table(entries: list[tuple[bytes, bytes]], *, per_block: int = 16, restart_every: int = 4) -> bytes:
    """A table in LevelDB's format: data blocks, an empty block of meta blocks, the index, the footer."""
    out, index = b"", []

    def add_block(content: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal out
        block, restarts, before = b"", [], b""
        for i, (key, value) in enumerate(content):
            shared = 0
            if i % restart_every == 0:
                restarts.append(len(block))
            else:
                while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                    shared += 1
            block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            before = key
        block += b"".join(struct.pack("<I", offset) for offset in restarts or [0])
        block += struct.pack("<I", len(restarts or [0]))
        handle = varint(len(out)) + varint(len(block))
        out += block + b"\0" + struct.pack("<I", masked(crc32c(block + b"\0")))
        return handle

    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        index.append((part[-1][0], add_block(part)))
    meta, own = add_block([]), add_block(index)
    return out + (meta + own).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def tensor_shape(shape: tuple[int, ...]) -> bytes:
    return b"".join(chunk(2, integer(1, size)) for size in shape)


def write_bundle(variables: Arrays, prefix: Path) -> Path:
    """Write a V2 checkpoint, and return its index: a header, and where each tensor lies in the data file."""
    data, entries = b"", [(b"", integer(1, 1) + chunk(3, integer(1, 1)))]
    for name, values in sorted(variables.items()):
        content = values.astype("<f4").tobytes()
        entry = integer(1, 1) + chunk(2, tensor_shape(values.shape))
        entry += (integer(4, len(data)) if data else b"") + integer(5, len(content))
        entries.append((name.encode(), entry + varint(6 << 3 | 5) + struct.pack("<I", masked(crc32c(content)))))
        data += content
    prefix.with_name(f"{prefix.name}.data-00000-of-00001").write_bytes(data)
    prefix.with_name(f"{prefix.name}.meta").write_bytes(b"the graph, which nobody reads")
    index = prefix.with_name(f"{prefix.name}.index")
    index.write_bytes(table(entries))
    return index


def write_v1(variables: Arrays, path: Path) -> Path:
    """Write a V1 checkpoint: a list of all tensors, then each as a slice that is the whole."""
    listed = b""
    for name, values in variables.items():
        whole = b"".join(chunk(1, b"") for _ in values.shape)
        listed += chunk(1, text(1, name) + chunk(2, tensor_shape(values.shape)) + integer(3, 1) + chunk(4, whole))
    entries = [(b"", chunk(1, listed))]
    for name, values in sorted(variables.items()):
        tensor = chunk(5, values.astype("<f4").tobytes())
        entries.append((b"\0" + name.encode(), chunk(2, text(1, name) + chunk(2, b"") + chunk(3, tensor))))
    path.write_bytes(table(entries))
    return path
