"""Message types of protobuf made from the few fields that we read, instead of from generated code.

Fields that are not declared are passed over by the parser. On the wire a packed array of floats and a message are a
length and that many bytes, as `bytes` are; declared as those, numpy takes an array without a Python object per number,
and messages are counted before they are parsed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from dist_deeplab.model.weights.variant import Damaged

Field = tuple[int, str] | tuple[int, str, int | str]
"""Number; type, e.g. `int64`, `repeated bytes` or another message's name; default (0 or empty without one)."""

_MAX_BYTES = 2**31 - 1  # of a message, by the format


def message_types(messages: Mapping[str, Mapping[str, Field]]) -> dict[str, Any]:
    """Classes of messages with the given names and fields, in proto2's syntax (with `HasField`)."""
    file = FileDescriptorProto(name="weights.proto", package="weights", syntax="proto2")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind, *default) in fields.items():
            label, _, kind = kind.rpartition(" ")
            field = message.field.add(name=field_name, number=number)
            field.label = FieldDescriptorProto.LABEL_REPEATED if label else FieldDescriptorProto.LABEL_OPTIONAL
            if kind in messages:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".weights.{kind}"
            else:
                field.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
            if default:
                field.default_value = str(default[0])
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"weights.{name}")) for name in messages}


def parse(kind: Any, data: bytes | memoryview) -> Any:
    """Message of type `kind` in some bytes.

    Raises:
        Damaged: they are not one.
    """
    if len(data) > _MAX_BYTES:
        raise Damaged("it has over 2 GiB, more than a protobuf message can have")
    try:
        return kind.FromString(bytes(data))
    except DecodeError:
        raise Damaged("it is not a valid protobuf message") from None


def parse_all(kind: Any, pieces: Sequence[bytes], *, at_most: int) -> list[Any]:
    """Messages of a repeated field that was declared as `repeated bytes`, so that they are counted before they exist:
    an empty message takes 2 bytes in a file and some 100 in memory.

    Raises:
        Damaged: more than `at_most`, or not messages.
    """
    if len(pieces) > at_most:
        raise Damaged(f"it holds {len(pieces):,} messages where at most {at_most:,} are expected")
    return [parse(kind, piece) for piece in pieces]


def numbers(pieces: Sequence[bytes], dtype: str) -> "np.ndarray[Any, Any]":
    """Values of a packed repeated field that was declared as `repeated bytes`: little-endian, as `dtype` says.

    Raises:
        Damaged: a part of a number is left over.
    """
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if len(data) % np.dtype(dtype).itemsize:
        raise Damaged("an array of numbers ends within a number")
    return np.frombuffer(data, dtype=dtype)
