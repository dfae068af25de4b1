"""What a set of WebDataset shards is: its manifest and its index.

A set `train` is made of `train-000000.tar ...` (standard WebDataset: `<key>.jpg` and `<key>.png` side by side),
`train.index.npy` (where each member's bytes lie, memory-mapped) and `train.json` (the manifest, written last).
`shard_reader.py` reads samples by position, which is what makes the sample order a pure function and a run resumable at
any step. A manifest may also be a URL: index and shards then lie beside it, and come through a `ShardCache`.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_deeplab.command_line import command_name
from dist_deeplab.data.shards.cache import ShardCache
from dist_deeplab.downloads import is_url, join_url, shown
from dist_deeplab.errors import UserError, first_line

FORMAT = "dist_deeplab.shards/1"
MAX_KEY_HASHES = 2**20  # 8 MiB in a checkpoint
INDEX_DTYPE = np.dtype(
    [
        *(("shard", "<i4"), ("header_offset", "<i8")),
        *(("image_offset", "<i8"), ("image_size", "<i8"), ("label_offset", "<i8"), ("label_size", "<i8")),
        *(("image_crc32", "<u4"), ("label_crc32", "<u4"), ("key_hash", "<u8")),
    ]
)
"""header_offset: where the image's tar header begins, the extended one of a long or non-ASCII name included.
crc32: of the member's bytes; a JPEG with a flipped bit decodes without complaint. key_hash: see `key_hash`."""


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
    """What a set of shards holds. `keys_sha256` (of the sorted keys) is the set's identity, however it is sharded.

    `path`, `url` and `cache` are not in the file: where the manifest lies on this machine, and, if they come from
    elsewhere, its URL and where its shards go. `notes`: sentences on what packing did to the images. `tile_side`,
    `tile_overlap`: pixels of the tiles that larger images were cut into; 0: images are whole.
    """

    split: str
    num_samples: int
    num_classes: int
    ignore_label: int
    class_names: tuple[str, ...]
    class_pixels: tuple[int, ...]
    keys_sha256: str
    index: str
    index_sha256: str
    shards: tuple[Shard, ...]
    path: Path
    url: str = ""
    cache: ShardCache | None = None
    notes: tuple[str, ...] = ()
    tile_side: int = 0
    tile_overlap: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def index_path(self) -> Path:
        """Where the index lies on this machine."""
        return self.path.with_name(self.index)

    def shard_name(self, number: int) -> str:
        """Return where a shard comes from, for messages: its path, or its URL."""
        name = self.shards[number].name
        return shown(join_url(self.url, name)) if self.url else str(self.path.with_name(name))

    @cached_property
    def key_hashes(self) -> np.ndarray:
        """Sorted 64-bit hashes of the sample keys, uint64; of a set above 2**20 samples only so many, the smallest.

        Two sets that are cut so still show what share they have in common.
        """
        return np.sort(open_index(self)["key_hash"].astype(np.uint64))[:MAX_KEY_HASHES]

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest file holds."""
        values = {"format": FORMAT, **asdict(self)}
        for key in ("path", "url", "cache"):
            del values[key]
        for key in ("notes", "tile_side", "tile_overlap"):  # ordinary sets can be read by older versions
            if not values[key]:
                del values[key]
        return values


def keys_digest(keys: list[str]) -> str:
    """Return the SHA-256 of the sorted keys, one a line: the identity of a set of samples."""
    return hashlib.sha256("".join(f"{key}\n" for key in sorted(keys)).encode()).hexdigest()


def key_hash(key: str) -> int:
    """Return 64 bits of the BLAKE2b digest of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def load_manifest(path: str | Path, *, cache: ShardCache | None = None) -> Manifest:
    """Return the manifest, after checking that index and shards are there with the sizes it says.

    Args:
        path: a file, or a URL of a kind that `downloads.fetch` takes.
        cache: where a URL's files come to lie; its shards come later, when they are read.

    Raises:
        ShardError: no manifest there; not one; an index or shard missing or of another size; no samples; a URL and no
            cache.
        DownloadError: the URL can't be fetched.
    """
    if is_url(str(path)):
        if cache is None:
            raise ShardError(
                f"{shown(str(path))} is a URL, and its shards need a place: set data.cache_dir to a folder on a disk "
                "of each node"
            )
        url = str(path)
        manifest = _parse(cache.fetch_manifest(url), {"url": url, "cache": cache})
        cache.fetch_index(url, manifest.index, sha256=manifest.index_sha256)
    else:
        manifest = _parse(Path(path).expanduser(), {})
        for number, shard in enumerate(manifest.shards):
            file = manifest.path.with_name(shard.name)
            size = file.stat().st_size if file.is_file() else None
            if size != shard.size_bytes:
                state = "is missing" if size is None else f"has {size:,} bytes, not {shard.size_bytes:,}"
                where = manifest.shard_name(number)
                raise ShardError(f"the shard {where} {state}; copy it again or make the shards again")
    open_index(manifest)
    return manifest


def _parse(path: Path, origin: dict[str, Any]) -> Manifest:
    """Return the manifest that a file holds, its numbers and names checked; `origin`: its `url` and `cache`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"there is no manifest at {path}; `{command_name('shards')}` makes one from VOC folders"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ShardError(f"{path} can't be read as a manifest ({reason}); give the .json beside the shards") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ShardError(f"{path} is not a {FORMAT!r} manifest; `{command_name('shards')}` writes one")
    try:
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        names, pixels = tuple(values.pop("class_names")), tuple(values.pop("class_pixels"))
        values["notes"] = tuple(values.get("notes", ()))
        manifest = Manifest(**values, class_names=names, class_pixels=pixels, shards=shards, path=path, **origin)
    except (TypeError, KeyError) as error:  # "... missing 1 required positional argument: 'index_sha256'"
        what = re.findall(r"'\w+'", str(error)) or [str(error)]
        raise ShardError(
            f"the manifest {path} does not fit this version of dist_deeplab (see {', '.join(what)}); make the shards "
            "again"
        ) from None
    if not isinstance(manifest.num_samples, int) or not isinstance(manifest.num_classes, int):
        raise ShardError(f"the manifest {path} holds a count that is no number; make the shards again")
    if manifest.num_samples < 1:
        raise ShardError(f"the set {path} is empty; make the shards again from a list that names images")
    for name in (manifest.index, *(shard.name for shard in manifest.shards)):
        if not isinstance(name, str) or Path(name).name != name:
            raise ShardError(f"the manifest {path} names {name!r}, which is no file beside it; make the shards again")
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


def open_index(manifest: Manifest) -> np.ndarray:
    """Return where each sample lies, INDEX_DTYPE [num_samples], mapped into memory.

    Raises:
        ShardError: missing, damaged, or of another set.
    """
    path = manifest.index_path
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and lets through whatever that raises
        raise ShardError(f"the index {path} can't be read ({first_line(error)}); make the shards again") from None
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.num_samples,):
        raise ShardError(f"the index {path} does not belong to {manifest.path}; make the shards again")
    return index
