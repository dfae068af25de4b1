"""The index of a set: where each sample's bytes lie in the shards, one record per sample, as a `.npy` file.

Read record by record from the file, not as a memory map: at 10**8 samples (7 GB) the pages that a map has touched would
be counted to every process, and an access behind the end of a truncated file would end it by SIGBUS.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_deeplab.errors import UserError, first_line

_PLACES = [
    *(("shard", "<i4"), ("header_offset", "<i8")),
    *(("image_offset", "<i8"), ("image_size", "<i8"), ("label_offset", "<i8"), ("label_size", "<i8")),
    *(("image_crc32", "<u4"), ("label_crc32", "<u4"), ("key_hash", "<u8")),
]
INDEX_DTYPE = np.dtype([*_PLACES, ("height", "<i4"), ("width", "<i4")])
"""header_offset: where the image's tar header begins, the extended one of a long or non-ASCII name included.
crc32: of the member's bytes; a JPEG with a flipped bit decodes without complaint. key_hash: see `keys.key_hash`.
height, width: of image and label in pixels, 0 where the label is not a PNG; not in sets of format 1."""
INDEX_DTYPE_1 = np.dtype(_PLACES)
_CHUNK_ROWS = 2**16  # 4 MiB
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio: spreads a number's bits (Knuth, TAOCP 6.4)


class ShardError(UserError):
    """A manifest, index or shard is missing, damaged, or does not belong to the others."""


class IndexFile:
    """Random access to the records of an index; forked processes may share it, spawned ones open it again.

    Raises:
        ShardError: missing, or not an index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        try:
            with path.open("rb") as file:
                shape, self.dtype, self._start = read_npy_header(file)
                size = os.fstat(file.fileno()).st_size
                self._file = os.dup(file.fileno())
        except Exception as error:  # numpy parses the header as Python, and lets through whatever that raises
            raise ShardError(f"the index {path} can't be read ({first_line(error)}); make the shards again") from None
        if self.dtype not in (INDEX_DTYPE, INDEX_DTYPE_1) or len(shape) != 1:
            raise ShardError(f"the index {path} is not one of shards; make the shards again")
        self._num_rows = shape[0]
        if size != self._start + self._num_rows * self.dtype.itemsize:
            raise ShardError(f"the index {path} has {size:,} bytes, which are not those of its samples; copy it again")

    def __len__(self) -> int:
        return self._num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexFile, (self.path,)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    @property
    def has_sizes(self) -> bool:
        """Whether the records hold height and width."""
        return self.dtype == INDEX_DTYPE

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The records `start <= index < stop`, of `dtype`.

        Raises:
            ShardError: they can't be read.
        """
        size = self.dtype.itemsize
        try:
            data = os.pread(self._file, (stop - start) * size, self._start + start * size)
        except OSError as error:  # e.g. a network file system that lost its server
            raise ShardError(f"the index {self.path} can't be read: {error.strerror}") from None
        if len(data) != (stop - start) * size:
            raise ShardError(f"the index {self.path} ends too early; copy it again")
        return np.frombuffer(data, self.dtype)

    def row(self, index: int) -> tuple[int, ...]:
        """One record, in the order of INDEX_DTYPE."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        record: tuple[int, ...] = self.rows(index, index + 1)[0].item()
        return record

    def chunks(self) -> Iterator[np.ndarray]:
        """All records in order, some 65,536 at a time."""
        for start in range(0, len(self), _CHUNK_ROWS):
            yield self.rows(start, min(start + _CHUNK_ROWS, len(self)))


def digest_of(chunks: Iterable[np.ndarray]) -> str:
    """Digest, in hexadecimal, of all records' keys, images and labels (by their CRC-32s), whatever their order."""
    total = np.zeros(1, dtype=np.uint64)
    for rows in chunks:
        both = rows["image_crc32"].astype(np.uint64) << np.uint64(32) | rows["label_crc32"]
        mixed = (rows["key_hash"] ^ both * _MIX) * _MIX
        total += ((mixed ^ mixed >> np.uint64(29)) * _MIX).sum(dtype=np.uint64)
    return f"{total[0]:016x}"


def read_npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and position of the records in a `.npy` file.

    Raises:
        ValueError: not one, or of a kind that may hold objects.
    """
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"it is of version {version} of the .npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or (fortran_order and len(shape) > 1):
        raise ValueError("it does not hold plain records")
    return shape, dtype, file.tell()


class IndexWriter:
    """Appends records to a new `.npy` file; their number, unknown before, is filled in at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._num_rows = 0
        self._start = self._write_header()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._file.seek(0)
            end = self._write_header()
            assert end == self._start, "numpy leaves room in the header for any number of rows"
        self._file.close()

    def append(self, rows: list[tuple[int, ...]]) -> None:
        """Add records, in the order of INDEX_DTYPE."""
        self._file.write(np.array(rows, dtype=INDEX_DTYPE).tobytes())
        self._num_rows += len(rows)

    def _write_header(self) -> int:
        about = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (self._num_rows,)}
        np.lib.format.write_array_header_1_0(self._file, about)
        return self._file.tell()
