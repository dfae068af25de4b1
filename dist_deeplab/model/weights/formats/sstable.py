"""LevelDB's table format, in which TensorFlow keeps checkpoints (V1) or their index (V2): keys in order, and values.

Written from the description in LevelDB's doc/table_format.md. Only what TensorFlow writes is read: no compression.
"""

from collections.abc import Iterator

import google_crc32c

from dist_deeplab.model.weights.variant import Damaged

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")  # the file's last bytes
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # of a block: compression, checksum
_MAX_KEY_BYTES = 512
_MAX_ENTRIES = 20_000  # a key repeats the one before for 3 bytes in the file, so their number limits the memory


def masked_crc32c(data: bytes | memoryview) -> int:
    """CRC-32C as TensorFlow stores it: rotated and shifted, so that a CRC of bytes that hold CRCs stays useful."""
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFF_FFFF


def read_table(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """A table's keys and values, in its order.

    Raises:
        Damaged: not a table, larger than any of a network, or not as it was written: each block has a checksum.
    """
    if len(data) < _FOOTER_BYTES or data[-8:] != MAGIC:
        raise Damaged("it does not end as a TensorFlow table does")
    footer = data[-_FOOTER_BYTES:-8]
    _, position = _read_handle(footer, 0)  # of the meta index block, which TensorFlow leaves empty
    index, _ = _read_handle(footer, position)
    covered = num_entries = 0
    for _, handle in _read_block(data, index):
        block, _ = _read_handle(handle, 0)
        covered += block[1] + _TRAILER_BYTES
        if covered > len(data):
            raise Damaged("its blocks overlap")
        for entry in _read_block(data, block):
            num_entries += 1
            if num_entries > _MAX_ENTRIES:
                raise Damaged(f"it has over {_MAX_ENTRIES:,} entries")
            yield entry


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """The base-128 integer at `position`, and the position after it.

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


def _read_handle(data: memoryview, position: int) -> tuple[tuple[int, int], int]:
    """A block's offset and length, and the position after them."""
    offset, position = _read_varint(data, position)
    length, position = _read_varint(data, position)
    return (offset, length), position


def _read_block(data: memoryview, handle: tuple[int, int]) -> Iterator[tuple[bytes, memoryview]]:
    """A block's keys and values. A key states how many bytes it shares with the one before."""
    offset, length = handle
    if offset + length + _TRAILER_BYTES > len(data) or length < 4:
        raise Damaged("a block lies outside of it")
    whole = data[offset : offset + length + 1]
    if int.from_bytes(data[offset + length + 1 : offset + length + _TRAILER_BYTES], "little") != masked_crc32c(whole):
        raise Damaged("the checksum of a block is wrong")
    if whole[-1] != 0:
        raise Damaged(f"a block is compressed (kind {whole[-1]}), which TensorFlow's checkpoints are not")
    num_restarts = int.from_bytes(whole[length - 4 : length], "little")
    end = length - 4 - 4 * num_restarts
    if end < 0:
        raise Damaged("a block is shorter than its list of restarts")
    position, key = 0, b""
    while position < end:
        shared, position = _read_varint(whole, position)
        rest, position = _read_varint(whole, position)
        size, position = _read_varint(whole, position)
        if shared > len(key) or shared + rest > _MAX_KEY_BYTES or rest + size > end - position:
            raise Damaged("an entry of a block lies outside of it")
        key = key[:shared] + bytes(whole[position : position + rest])
        position += rest
        yield key, whole[position : position + size]
        position += size
