"""CRC-32C (Castagnoli), which TensorFlow's files carry: many lanes at once by numpy, at some 100 MB/s."""

import functools
from typing import Any

import numpy as np

_POLYNOMIAL = 0x82F63B78  # reflected; RFC 3720, appendix B.4
_SMALL = 64  # bytes below which lanes do not pay
_LONGEST_LANE = 1024  # bytes

_Array = np.ndarray[Any, Any]


@functools.cache
def _table() -> _Array:
    """Return what each byte does to a register of 0, uint32 [256]."""
    register: _Array = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = (register >> 1) ^ np.where(register & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return register


def crc32c(data: bytes | memoryview) -> int:
    """Return the CRC-32C of some bytes."""
    table = _table()
    if len(data) < _SMALL:
        register = 0xFFFF_FFFF
        for byte in bytes(data):
            register = int(table[(register ^ byte) & 0xFF]) ^ (register >> 8)
        return register ^ 0xFFFF_FFFF
    # A register that starts at all ones is one that starts at 0, with the first four bytes inverted. From 0, zero bytes
    # in front change nothing, so that the data fill a power of two of equal lanes.
    length = min(_LONGEST_LANE, _SMALL if len(data) < 2**16 else _LONGEST_LANE)
    num_lanes = 1 << max(0, (len(data) // length - 1).bit_length())
    length = -(-len(data) // num_lanes)
    padded = np.zeros(num_lanes * length, dtype=np.uint8)
    padded[len(padded) - len(data) :] = np.frombuffer(data, dtype=np.uint8)
    start = len(padded) - len(data)
    padded[start : start + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.reshape(num_lanes, length).T)
    registers = np.zeros(num_lanes, dtype=np.uint32)
    for column in columns:
        registers = table[(registers ^ column) & 0xFF] ^ (registers >> 8)
    while len(registers) > 1:  # neighbours become one lane of twice the length
        registers = _apply(_zeros_operator(length), registers[0::2]) ^ registers[1::2]
        length *= 2
    return int(registers[0]) ^ 0xFFFF_FFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """Return the checksum as TensorFlow stores it: rotated and moved, so that a CRC of CRCs says something."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFF_FFFF


@functools.lru_cache(maxsize=256)
def _zeros_operator(num_bytes: int) -> tuple[int, ...]:
    """Return what `num_bytes` zero bytes do to each of a register's 32 bits: a matrix over GF(2)."""
    if num_bytes == 1:
        bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
        return tuple(int(value) for value in _table()[bits & 0xFF] ^ (bits >> 8))
    half = np.array(_zeros_operator(num_bytes // 2), dtype=np.uint32)
    doubled = _apply(tuple(half.tolist()), half)
    if num_bytes % 2:
        doubled = _apply(_zeros_operator(1), doubled)
    return tuple(int(value) for value in doubled)


def _apply(operator: tuple[int, ...], registers: _Array) -> _Array:
    result = np.zeros_like(registers)
    for bit, value in enumerate(operator):
        result ^= np.where((registers >> np.uint32(bit)) & np.uint32(1), np.uint32(value), np.uint32(0))
    return result
