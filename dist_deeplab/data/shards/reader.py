"""Sample i of a set -> its bytes, by position read from a WebDataset shard."""

import io
import os
import struct
import tarfile
import zlib
from collections import OrderedDict
from typing import Any, NamedTuple

from dist_deeplab.data.shards.index_file import IndexFile, ShardError
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.downloads import join_url

MAX_OPEN_SHARDS = 64
_TAR_BLOCK = tarfile.BLOCKSIZE
_PNG_HEADER = struct.Struct(">8s8xII")  # signature, IHDR's length and type, width, height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_BYTES = _PNG_HEADER.size


class Sample(NamedTuple):
    """The stored bytes of one sample."""

    key: str
    image: bytes
    label: bytes


def _read_header(header: bytes) -> tuple[str, int]:
    """Name and size that a member's header blocks give, an extended header (PAX, GNU) included.

    Raises:
        tarfile.TarError: these are not header blocks.
    """
    last = tarfile.TarInfo.frombuf(header[-_TAR_BLOCK:], "utf-8", "surrogateescape")
    if len(header) == _TAR_BLOCK:
        return last.name, last.size
    with tarfile.open(fileobj=io.BytesIO(header + bytes(_TAR_BLOCK)), mode="r:") as tar:
        member = tar.next()
    if member is None or member.offset_data != len(header):
        raise tarfile.ReadError("no member")
    return member.name, last.size


class ShardReader:
    """Random access to the samples of a manifest, by `os.pread`: no seek state, so forked workers may share it.

    Pickles without its open files (spawned workers open their own). Keeps at most `max_open` shards open.
    """

    def __init__(self, manifest: Manifest, *, max_open: int = MAX_OPEN_SHARDS) -> None:
        self.manifest = manifest
        self.max_open = max_open
        self._index: IndexFile | None = None
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_index": None, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, index: int) -> Sample:
        """The bytes of sample `index` (0 <= index < len).

        Raises:
            ShardError: the shard has vanished, is not what its index says, or its bytes are damaged.
            DownloadError: the shard comes from a URL and can't be fetched.
        """
        shard, header_offset, image_offset, image_size, label_offset, label_size, image_crc32, label_crc32, *_ = (
            self._row(index)
        )
        header_size = image_offset - header_offset
        if header_size < _TAR_BLOCK:
            raise self._mismatch(shard, index)
        image = self._pread(shard, header_offset, header_size + image_size, index)
        label = self._pread(shard, label_offset - _TAR_BLOCK, _TAR_BLOCK + label_size, index)
        try:
            name, size_in_header = _read_header(image[:header_size])
            if (size_in_header, _read_header(label[:_TAR_BLOCK])[1]) != (image_size, label_size):
                raise tarfile.ReadError("other sizes")
        except (tarfile.TarError, ValueError):
            raise self._mismatch(shard, index) from None
        sample = Sample(split_name(name)[0], image[header_size:], label[_TAR_BLOCK:])
        if (zlib.crc32(sample.image), zlib.crc32(sample.label)) != (image_crc32, label_crc32):
            raise ShardError(
                f"sample {sample.key!r} in {self.manifest.shard_name(shard)} is damaged: its bytes do not have the "
                "checksum of the index; copy or make the shards again"
            )
        return sample

    def shard_name(self, index: int) -> str:
        """The shard that sample `index` is in, for messages."""
        return self.manifest.shard_name(self._row(index)[0])

    def key(self, index: int) -> str:
        """The key of sample `index`, from its tar header alone."""
        shard, start, image_offset, image_size, *_ = self._row(index)
        try:
            name, size = _read_header(self._pread(shard, start, image_offset - start, index))
        except tarfile.TarError:
            raise self._mismatch(shard, index) from None
        if size != image_size:
            raise self._mismatch(shard, index)
        return split_name(name)[0]

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of sample `index` in pixels: from the index, without reading a shard.

        Sets of format 1 have them not there, but in the first bytes of the label.

        Raises:
            ShardError: there is no PNG; the shard has vanished or is shorter than its index says.
        """
        shard, _, _, _, label_offset, *_, height, width = self._row(index)
        if self._open_index().has_sizes and height > 0:
            return height, width
        size = png_size(self._pread(shard, label_offset, PNG_HEADER_BYTES, index))
        if size is None:
            where = self.manifest.shard_name(shard)
            raise ShardError(f"the label of sample {index} in {where} is not a PNG; make the shards again")
        return size

    def _open_index(self) -> IndexFile:
        if self._index is None:
            self._index = self.manifest.open_index()
        return self._index

    def _row(self, index: int) -> tuple[int, ...]:
        """The index's entry of a sample, in the order of INDEX_DTYPE."""
        row = self._open_index().row(index)
        if not 0 <= row[0] < len(self.manifest.shards):
            raise ShardError(f"sample {index} of {self.manifest.path} is in no shard of the set; make the shards again")
        return row

    def _mismatch(self, shard: int, index: int) -> ShardError:
        where = f"sample {index} is not where the index says in {self.manifest.shard_name(shard)}"
        return ShardError(f"{where}; copy or make the shards again")

    def _pread(self, shard: int, offset: int, size: int, index: int) -> bytes:
        if not 0 <= offset < offset + size <= self.manifest.shards[shard].size_bytes:  # however large an index says
            raise self._mismatch(shard, index)
        try:
            data = os.pread(self._open(shard), size, offset)
        except OSError as error:  # e.g. a network file system that lost its server
            raise ShardError(f"cannot read the shard {self.manifest.shard_name(shard)}: {error.strerror}") from None
        if len(data) != size:
            raise self._mismatch(shard, index)
        return data

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = open_shard(self.manifest, shard)
            if len(self._files) > self.max_open:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return file


def open_shard(manifest: Manifest, number: int) -> int:
    """A descriptor of a shard, brought into the cache first if it comes from a URL; the caller closes it.

    Raises:
        ShardError: it is not there, or of another size than the manifest says.
        DownloadError: it can't be fetched.
    """
    shard = manifest.shards[number]
    if manifest.cache is not None:
        url = join_url(manifest.url, shard.name)
        return manifest.cache.open_shard(url, sha256=shard.sha256, size=shard.size_bytes)
    try:
        file = os.open(manifest.path.with_name(shard.name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"cannot open the shard {manifest.shard_name(number)}: {error.strerror}") from None
    size = os.fstat(file).st_size
    if size != shard.size_bytes:
        os.close(file)
        raise ShardError(
            f"the shard {manifest.shard_name(number)} has {size:,} bytes, not {shard.size_bytes:,}; copy it again or "
            "make the shards again"
        )
    return file


def png_size(header: bytes) -> tuple[int, int] | None:
    """Height and width that the first PNG_HEADER_BYTES of a PNG say; None for other files."""
    if len(header) < PNG_HEADER_BYTES:
        return None
    signature, width, height = _PNG_HEADER.unpack(header[:PNG_HEADER_BYTES])
    return (height, width) if signature == _PNG_SIGNATURE else None


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member, as WebDataset has it: cut at the first dot of the last part of its path."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending
