"""A set of WebDataset shards read by position: manifest + index -> bytes of sample i.

A set `train` is made of `train-000000.tar ...` (standard WebDataset: `<key>.jpg` and `<key>.png` side by side),
`train.index.npy` (where each member's bytes lie, memory-mapped) and `train.json` (the manifest, written last).
Reading by position is what makes the sample order a pure function and a run resumable at any step.
"""

import hashlib
import io
import json
import os
import struct
import tarfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_deeplab.errors import UserError

FORMAT = "dist_deeplab.shards/1"
MAX_KEY_HASHES = 2**20  # 8 MiB in a checkpoint
INDEX_DTYPE = np.dtype(
    [
        *(("shard", "<i4"), ("header_offset", "<i8")),
        *(("image_offset", "<i8"), ("image_size", "<i8"), ("label_offset", "<i8"), ("label_size", "<i8")),
    ]
)
"""header_offset: where the image's tar header begins, the extended one of a long or non-ASCII name included."""
_MAX_OPEN_SHARDS = 64
_TAR_BLOCK = tarfile.BLOCKSIZE
_PNG_HEADER = struct.Struct(">8s8xII")  # signature, IHDR's length and type, width, height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class ShardError(UserError):
    """A manifest, index or shard is missing, damaged, or does not belong to the others."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name beside the manifest, samples, bytes and SHA-256."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a set of shards holds. `keys_sha256` (of the sorted keys) is the set's identity, however it is sharded."""

    split: str
    num_samples: int
    num_classes: int
    ignore_label: int
    class_names: tuple[str, ...]
    class_pixels: tuple[int, ...]
    keys_sha256: str
    index: str
    shards: tuple[Shard, ...]
    path: Path

    @cached_property
    def key_hashes(self) -> np.ndarray:
        """Sorted 64-bit hashes of the sample keys, uint64; of a set above 2**20 samples only so many, the smallest.

        Two sets that are cut so still show what share they have in common. Reads the samples' tar headers, once.
        """
        reader = ShardReader(self)
        digests = b"".join(
            hashlib.blake2b(reader.key(index).encode(), digest_size=8).digest() for index in range(self.num_samples)
        )
        return np.sort(np.frombuffer(digests, dtype="<u8").astype(np.uint64))[:MAX_KEY_HASHES]

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest file holds."""
        values = {"format": FORMAT, **asdict(self)}
        del values["path"]
        return values


class Sample(NamedTuple):
    """The stored bytes of one sample."""

    key: str
    image: bytes
    label: bytes


def keys_digest(keys: list[str]) -> str:
    """Return the SHA-256 of the sorted keys, one a line: the identity of a set of samples."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(keys)).encode()).hexdigest()


def load_manifest(path: str | Path) -> Manifest:
    """Return the manifest, after checking that index and shards are there with the sizes it says.

    Raises:
        ShardError: no manifest there; not one; an index or shard missing or of another size; no samples.
    """
    path = Path(path).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"there is no manifest at {path}; tools/make_shards.py makes one from VOC folders (see README)"
        ) from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} can't be read as a manifest ({error}); give the .json beside the shards") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ShardError(f"{path} is not a {FORMAT!r} manifest; tools/make_shards.py writes one")
    try:
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        names, pixels = tuple(values.pop("class_names")), tuple(values.pop("class_pixels"))
        manifest = Manifest(**values, class_names=names, class_pixels=pixels, shards=shards, path=path)
    except (TypeError, KeyError) as error:
        raise ShardError(f"the manifest {path} is incomplete ({error}); make the shards again") from None
    if not isinstance(manifest.num_samples, int) or not isinstance(manifest.num_classes, int):
        raise ShardError(f"the manifest {path} holds a count that is no number; make the shards again")
    if manifest.num_samples < 1:
        raise ShardError(f"the set {path} is empty; make the shards again from a list that names images")
    for shard in manifest.shards:
        file = path.parent / shard.name
        size = file.stat().st_size if file.is_file() else None
        if size != shard.size_bytes:
            state = "is missing" if size is None else f"has {size:,} bytes, not {shard.size_bytes:,}"
            raise ShardError(f"the shard {file} {state}; copy it again or make the shards again")
    _open_index(manifest)
    return manifest


def require_fit(manifest: Manifest, *, num_classes: int, ignore_label: int) -> None:
    """Check that the shards' labels are what the model is configured for.

    Raises:
        ShardError: another number of classes or another void label.
    """
    if manifest.num_classes != num_classes:
        raise ShardError(
            f"{manifest.path} holds {manifest.num_classes} classes but the model has {num_classes}; set "
            f"data.num_classes={manifest.num_classes} (and model.restore_last=false if the weights have other classes)"
        )
    if manifest.ignore_label != ignore_label:
        raise ShardError(
            f"{manifest.path} marks void by {manifest.ignore_label}, not {ignore_label}; set "
            f"data.ignore_label={manifest.ignore_label}"
        )


def _open_index(manifest: Manifest) -> np.ndarray:
    path = manifest.path.parent / manifest.index
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"the index {path} can't be read ({error}); make the shards again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.num_samples,):
        raise ShardError(f"the index {path} does not belong to {manifest.path}; make the shards again")
    return index


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
            ShardError: the shard has vanished or is shorter than its index says.
        """
        row = self._row(index)
        shard, image_offset = int(row["shard"]), int(row["image_offset"])
        header_size = image_offset - int(row["header_offset"])
        label_start, label_size = int(row["label_offset"]) - _TAR_BLOCK, int(row["label_size"])
        image = self._pread(shard, int(row["header_offset"]), header_size + int(row["image_size"]), index)
        label = self._pread(shard, label_start, _TAR_BLOCK + label_size, index)
        try:
            name, image_size = _read_header(image[:header_size])
            if (image_size, _read_header(label[:_TAR_BLOCK])[1]) != (row["image_size"], label_size):
                raise tarfile.ReadError("other sizes")
        except tarfile.TarError:
            raise self._mismatch(shard, index) from None
        return Sample(name.rpartition(".")[0], image[header_size:], label[_TAR_BLOCK:])

    def shard_path(self, index: int) -> Path:
        """Return the shard that sample `index` is in, for messages."""
        return self._path(int(_open_index(self.manifest)[index]["shard"]))

    def key(self, index: int) -> str:
        """Return the key of sample `index`, from its tar header alone."""
        row = self._row(index)
        start, shard = int(row["header_offset"]), int(row["shard"])
        try:
            name, size = _read_header(self._pread(shard, start, int(row["image_offset"]) - start, index))
        except tarfile.TarError:
            raise self._mismatch(shard, index) from None
        if size != row["image_size"]:
            raise self._mismatch(shard, index)
        return name.rpartition(".")[0]

    def image_size(self, index: int) -> tuple[int, int]:
        """Return height and width of sample `index` in pixels, from the first bytes of its label.

        Raises:
            ShardError: there is no PNG; the shard has vanished or is shorter than its index says.
        """
        row = self._row(index)
        shard = int(row["shard"])
        header = self._pread(shard, int(row["label_offset"]), _PNG_HEADER.size, index)
        signature, width, height = _PNG_HEADER.unpack(header)
        if signature != _PNG_SIGNATURE:
            raise ShardError(f"the label of sample {index} in {self._path(shard)} is no PNG; make the shards again")
        return height, width

    def _row(self, index: int) -> np.void:
        """Return the index's entry of a sample."""
        if self._index is None:
            self._index = _open_index(self.manifest)
        row = self._index[index]
        if not 0 <= row["shard"] < len(self.manifest.shards):
            raise ShardError(f"sample {index} of {self.manifest.path} is in no shard of the set; make the shards again")
        return row

    def _mismatch(self, shard: int, index: int) -> ShardError:
        where = f"sample {index} is not where the index says in {self._path(shard)}"
        return ShardError(f"{where}; copy or make the shards again")

    def _path(self, shard: int) -> Path:
        return self.manifest.path.parent / self.manifest.shards[shard].name

    def _pread(self, shard: int, offset: int, size: int, index: int) -> bytes:
        data = os.pread(self._open(shard), size, offset) if size > 0 <= offset else b""
        if len(data) != size:
            raise self._mismatch(shard, index)
        return data

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            path = self._path(shard)
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ShardError(f"cannot open the shard {path}: {error.strerror}") from None
            self._files[shard] = file
            if len(self._files) > _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return file
