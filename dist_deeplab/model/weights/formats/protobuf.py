"""Protocol Buffers' wire format, read without generated code: https://protobuf.dev/programming-guides/encoding.

Nothing is copied and nothing allocated by what the bytes claim: strings, packed numbers and inner messages are views of
the file's bytes, checked to lie within them.
"""

from typing import Any

import numpy as np

from dist_deeplab.model.weights.variant import Damaged

_MAX_FIELDS = 1_000_000  # of one message; the authors' largest has some thousands
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_Value = int | memoryview


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the base-128 integer at `position` and the position behind it.

    Raises:
        Damaged: it does not end within the data and 64 bits.
    """
    value = shift = 0
    while shift < 70 and position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7
    raise Damaged("a number does not end")


class Message:
    """A message's fields by number; what a field means is up to the caller.

    Raises:
        Damaged: the bytes are no message.
    """

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[tuple[int, _Value]]] = {}
        position, count = 0, 0
        while position < len(data):
            tag, position = read_varint(data, position)
            number, wire_type = tag >> 3, tag & 7
            value: _Value
            if wire_type == _VARINT:
                value, position = read_varint(data, position)
            else:
                if wire_type == _BYTES:
                    length, position = read_varint(data, position)
                elif wire_type in (_FIXED32, _FIXED64):
                    length = 4 if wire_type == _FIXED32 else 8
                else:
                    raise Damaged(f"field {number} is of the unknown wire type {wire_type}")
                if length > len(data) - position:
                    raise Damaged(f"field {number} ends {length - (len(data) - position):,} bytes behind its message")
                value = data[position : position + length]
                position += length
            count += 1
            if number == 0 or count > _MAX_FIELDS:
                raise Damaged("it has a field 0" if number == 0 else f"a message has over {_MAX_FIELDS:,} fields")
            self._fields.setdefault(number, []).append((wire_type, value))

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def ints(self, number: int) -> list[int]:
        """Return a repeated integer field, packed or not; the numbers are unsigned."""
        values = []
        for wire_type, value in self._fields.get(number, ()):
            if isinstance(value, int):
                values.append(value)
            elif wire_type == _BYTES:
                position = 0
                while position < len(value):
                    item, position = read_varint(value, position)
                    values.append(item)
            else:
                raise Damaged(f"field {number} is no integer")
            if len(values) > _MAX_FIELDS:
                raise Damaged(f"field {number} has over {_MAX_FIELDS:,} integers")
        return values

    def integer(self, number: int, default: int = 0) -> int:
        """Return an integer field; the last one counts, as the format says."""
        values = self.ints(number)
        return values[-1] if values else default

    def fixed32(self, number: int) -> int | None:
        """Return a fixed32 field."""
        views = self._views(number, _FIXED32)
        return int.from_bytes(views[-1], "little") if views else None

    def floats(self, number: int, dtype: str = "<f4") -> "np.ndarray[Any, Any]":
        """Return a repeated float (`<f4`) or double (`<f8`) field, packed or not: a view where it is one piece."""
        kind = np.dtype(dtype)
        pieces = []
        for _, value in self._fields.get(number, ()):
            if isinstance(value, int) or len(value) % kind.itemsize:
                raise Damaged(f"field {number} is no sequence of {8 * kind.itemsize}-bit numbers")
            pieces.append(value)
        if len(pieces) == 1:
            return np.frombuffer(pieces[0], dtype=kind)
        return np.frombuffer(b"".join(pieces), dtype=kind)

    def text(self, number: int) -> str:
        """Return a string field, empty where there is none."""
        views = self._views(number, _BYTES)
        try:
            return bytes(views[-1]).decode() if views else ""
        except UnicodeDecodeError:
            raise Damaged(f"field {number} is no text") from None

    def messages(self, number: int) -> "list[Message]":
        """Return a repeated field of inner messages."""
        return [Message(view) for view in self._views(number, _BYTES)]

    def message(self, number: int) -> "Message | None":
        """Return an inner message; several are one, as the format says."""
        views = self._views(number, _BYTES)
        if len(views) > 1:
            return Message(memoryview(b"".join(views)))
        return Message(views[0]) if views else None

    def views(self, number: int) -> list[memoryview]:
        """Return the bytes of a repeated string, bytes or message field."""
        return self._views(number, _BYTES)

    def _views(self, number: int, wire_type: int) -> list[memoryview]:
        views = []
        for found, value in self._fields.get(number, ()):
            if found != wire_type or isinstance(value, int):
                raise Damaged(f"field {number} is of wire type {found}, not {wire_type}")
            views.append(value)
        return views
