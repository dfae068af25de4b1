"""Which classes each sample of a set contains: `<split>.classes.npy`, an optional file beside the index.

uint8 [num_samples, ceil(num_classes / 8)], in the order of the index: class `c` is bit `c % 8` (the lowest is bit 0) of
byte `c // 8`. The manifest has its SHA-256, which is checked at each reading: the order of the samples depends on it.
"""

import dataclasses
import hashlib
import os

import numpy as np

from dist_deeplab.command_line import command_name
from dist_deeplab.data.shards.index_file import ShardError, read_npy_header
from dist_deeplab.data.shards.manifest import Manifest, save_manifest
from dist_deeplab.errors import first_line
from dist_deeplab.files import replace_file, sha256


class SetContents:
    """What all samples contain, counted one sample after the other.

    `class_pixels`: pixels of each class, int64 [num_classes]. Memory: ceil(num_classes / 8) bytes per sample.
    """

    def __init__(self, num_classes: int) -> None:
        self.class_pixels = np.zeros(num_classes, dtype=np.int64)
        self.num_samples = 0
        self._rows = bytearray()

    def add(self, class_pixels: np.ndarray) -> None:
        """Count one sample, given its pixels of each class, int64 [num_classes]."""
        self.class_pixels += class_pixels
        self.num_samples += 1
        self._rows += np.packbits(class_pixels > 0, bitorder="little").tobytes()

    @property
    def presence(self) -> np.ndarray:
        """Which classes each sample contains, as in the file."""
        return np.frombuffer(bytes(self._rows), np.uint8).reshape(self.num_samples, _row_bytes(len(self.class_pixels)))


def save_with_presence(manifest: Manifest, contents: SetContents) -> None:
    """Write which classes each sample contains to `<name>.classes.npy`, then the manifest, which names that file."""
    path = manifest.path.with_suffix(".classes.npy")
    with_file = dataclasses.replace(manifest, classes=path.name)
    replace_file(path, lambda temporary: _write(temporary, contents.presence))
    save_manifest(dataclasses.replace(with_file, classes_sha256=sha256(path)))


def read_presence(manifest: Manifest) -> np.ndarray:
    """Which classes each sample contains, uint8 [num_samples, ceil(num_classes / 8)]; of a URL, fetched first.

    Raises:
        ShardError: the set has no such file, or it is missing, damaged, or of another set.
        DownloadError: it can't be fetched.
    """
    if not manifest.classes:
        raise ShardError(
            f"the set {manifest.path} has no file of which classes each sample contains, which data.repeat_threshold "
            f"needs; add it by `{command_name('shards')} add-classes {manifest.path.name}` in the folder of its shards"
        )
    path, shape = manifest.classes_path, (manifest.num_samples, _row_bytes(manifest.num_classes))
    if manifest.cache is not None:
        manifest.cache.fetch_beside(manifest.url, manifest.classes, sha256=manifest.classes_sha256)
    try:
        with path.open("rb") as file:
            found, dtype, start = read_npy_header(file)
            size = os.fstat(file.fileno()).st_size
            fits = (found, dtype) == (shape, np.dtype(np.uint8)) and size == start + shape[0] * shape[1]
            file.seek(0)
            content = file.read(size) if fits else b""  # no more than the manifest's samples need
    except Exception as error:  # numpy parses the header as Python, and lets through whatever that raises
        raise ShardError(f"the file {path} can't be read ({first_line(error)}); copy it again") from None
    if not fits or hashlib.sha256(content).hexdigest() != manifest.classes_sha256:
        raise ShardError(f"the file {path} is not the one that {manifest.path} names; copy it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _row_bytes(num_classes: int) -> int:
    return -(-num_classes // 8)


def _write(path: os.PathLike[str], presence: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.lib.format.write_array(file, presence, version=(1, 0))
