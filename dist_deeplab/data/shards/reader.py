"""Sample i of a set -> its bytes, by position read from a WebDataset shard."""

import io
import os
import struct
import tarfile
import zlib
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from dist_deeplab.data.shards.manifest import Manifest, ShardError, open_index
from dist_deeplab.downloads import join_url

_MAX_OPEN_SHARDS = 64
_TAR_BLOCK = tarfile.BLOCKSIZE
_PNG_HEADER = struct.Struct(">8s8xII")  # signature, IHDR's length and type, width, height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Sample(NamedTuple):
    """The stored bytes of one sample."""

    key: str
    image: bytes
    label: bytes


def _read_header(header: bytes) -> tuple[str, int]:
    """Return name and size that a member's header blocks give, an extended header (PAX, GNU) included.

    Raises:
        tarfile.TarError: these are no header blocks.
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

    Pickles as the manifest alone (spawned workers open their own files). Keeps at most 64 shards open.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._index: np.ndarray | None = None
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "_index": None, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, index: int) -> Sample:
        """Return the bytes of sample `index` (0 <= index < len).

        Raises:
            ShardError: the shard has vanished, is not what its index says, or its bytes are damaged.
            DownloadError: the shard comes from a URL and can't be fetched.
        """
        shard, header_offset, *places, _ = self._row(index)
        image_offset, image_size, label_offset, label_size, image_crc32, label_crc32 = places
        header_size = image_offset - header_offset
        image = self._pread(shard, header_offset, header_size + image_size, index)
        label = self._pread(shard, label_offset - _TAR_BLOCK, _TAR_BLOCK + label_size, index)
        try:
            name, size_in_header = _read_header(image[:header_size])
            if (size_in_header, _read_header(label[:_TAR_BLOCK])[1]) != (image_size, label_size):
                raise tarfile.ReadError("other sizes")
        except tarfile.TarError:
            raise self._mismatch(shard, index) from None
        sample = Sample(split_name(name)[0], image[header_size:], label[_TAR_BLOCK:])
        if (zlib.crc32(sample.image), zlib.crc32(sample.label)) != (image_crc32, label_crc32):
            raise ShardError(
                f"sample {sample.key!r} in {self.manifest.shard_name(shard)} is damaged: its bytes do not have the "
                "checksum of the index; copy or make the shards again"
            )
        return sample

    def shard_name(self, index: int) -> str:
        """Return the shard that sample `index` is in, for messages."""
        return self.manifest.shard_name(self._row(index)[0])

    def key(self, index: int) -> str:
        """Return the key of sample `index`, from its tar header alone."""
        shard, start, image_offset, image_size, *_ = self._row(index)
        try:
            name, size = _read_header(self._pread(shard, start, image_offset - start, index))
        except tarfile.TarError:
            raise self._mismatch(shard, index) from None
        if size != image_size:
            raise self._mismatch(shard, index)
        return split_name(name)[0]

    def image_size(self, index: int) -> tuple[int, int]:
        """Return height and width of sample `index` in pixels, from the first bytes of its label.

        Raises:
            ShardError: there is no PNG; the shard has vanished or is shorter than its index says.
        """
        shard, _, _, _, label_offset, *_ = self._row(index)
        signature, width, height = _PNG_HEADER.unpack(self._pread(shard, label_offset, _PNG_HEADER.size, index))
        if signature != _PNG_SIGNATURE:
            where = self.manifest.shard_name(shard)
            raise ShardError(f"the label of sample {index} in {where} is no PNG; make the shards again")
        return height, width

    def _row(self, index: int) -> tuple[int, ...]:
        """Return the index's entry of a sample, in the order of INDEX_DTYPE."""
        if self._index is None:
            self._index = open_index(self.manifest)
        row: tuple[int, ...] = self._index[index].item()
        if not 0 <= row[0] < len(self.manifest.shards):
            raise ShardError(f"sample {index} of {self.manifest.path} is in no shard of the set; make the shards again")
        return row

    def _mismatch(self, shard: int, index: int) -> ShardError:
        where = f"sample {index} is not where the index says in {self.manifest.shard_name(shard)}"
        return ShardError(f"{where}; copy or make the shards again")

    def _pread(self, shard: int, offset: int, size: int, index: int) -> bytes:
        if min(offset, size) < 0 or offset + size > self.manifest.shards[shard].size_bytes:
            raise self._mismatch(shard, index)  # pread would allocate what a damaged index claims
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
            if len(self._files) > _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return file


def open_shard(manifest: Manifest, number: int) -> int:
    """Return a descriptor of a shard, brought into the cache first if it comes from a URL; the caller closes it.

    Raises:
        ShardError: it is not there.
        DownloadError: it can't be fetched.
    """
    shard = manifest.shards[number]
    if manifest.cache is not None:
        url = join_url(manifest.url, shard.name)
        return manifest.cache.open_shard(url, sha256=shard.sha256, size=shard.size_bytes)
    try:
        return os.open(manifest.path.with_name(shard.name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"cannot open the shard {manifest.shard_name(number)}: {error.strerror}") from None


def split_name(name: str) -> tuple[str, str]:
    """Return key and ending of a member, as WebDataset has it: cut at the first dot of the last part of its path."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending
