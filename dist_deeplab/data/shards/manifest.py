"""What a set of WebDataset shards is: its manifest and its index.

A set `train` is made of `train-000000.tar ...` (standard WebDataset: `<key>.jpg` and `<key>.png` side by side),
`train.index.npy` (where each member's bytes lie), `train.classes.npy` (which classes each sample contains; see
`presence.py`; optional) and `train.json` (the manifest, written last). `reader.py` reads
samples by position, which is what makes the sample order a pure function and a run resumable at any step. A manifest
may also be a URL: index and shards then lie beside it, and come through a `ShardCache`.

A manifest may come from anybody: every value is checked before it is used.
"""

import json
import os
import stat
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dist_deeplab.command_line import command_name
from dist_deeplab.data.shards.cache import ShardCache
from dist_deeplab.data.shards.index_file import IndexFile, ShardError, digest_of
from dist_deeplab.downloads import is_url, join_url, shown
from dist_deeplab.files import replace_text
from dist_deeplab.logs import format_count

FORMAT: Final = "dist_deeplab.shards/2"
MAX_KEY_HASHES = 2**20  # 8 MiB in a checkpoint
_MAX_CLASSES = 255  # 8 bits less the void label


_PlainName = Annotated[
    str, Field(pattern=r"^([^./\x00][^/\x00]*|\.[^./\x00][^/\x00]*)$")
]  # not "", ".", "..", nor a path
_IndexName = Annotated[str, Field(pattern=r"^[^/\x00]+\.npy$")]  # nothing that could be the manifest's copy in a cache
_OptionalName = Annotated[str, Field(pattern=r"^([^/\x00]+\.npy)?$")]
_OptionalDigest = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file: its name beside the manifest, samples, bytes and SHA-256; some 300 bytes of memory on each rank."""

    __pydantic_config__ = _STRICT

    name: _PlainName
    num_samples: _Count
    size_bytes: _Count
    sha256: _Digest


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """What a manifest file holds. `keys_sha256` (of the sorted keys) is the set's identity, however it is sharded.

    `notes`: sentences on what packing did to the images. `tile_side`, `tile_overlap`: pixels of the tiles that larger
    images were cut into; 0: images are whole. `classes`, `classes_sha256`: the file of which classes each sample
    contains; "": the set has none.
    """

    __pydantic_config__ = _STRICT

    format: Literal["dist_deeplab.shards/1", "dist_deeplab.shards/2"] = FORMAT
    split: _PlainName
    num_samples: _Count
    num_classes: Annotated[int, Field(ge=1, le=_MAX_CLASSES)]
    ignore_label: Annotated[int, Field(ge=0, le=255)]
    class_names: tuple[str, ...]
    class_pixels: tuple[_Count, ...]
    keys_sha256: _Digest
    index: _IndexName
    index_sha256: _Digest
    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()
    tile_side: _Count = 0
    tile_overlap: _Count = 0
    classes: _OptionalName = ""
    classes_sha256: _OptionalDigest = ""


@dataclass(frozen=True, kw_only=True)
class Manifest(ManifestFile):
    """A set of shards and where it is: the manifest's path on this machine; its URL and cache if it has them."""

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

    @property
    def classes_path(self) -> Path:
        """Where the file `classes` lies on this machine, if the set has one."""
        return self.path.with_name(self.classes)

    def shard_name(self, number: int) -> str:
        """Where a shard comes from, for messages: its path, or its URL."""
        name = self.shards[number].name
        return shown(join_url(self.url, name)) if self.url else str(self.path.with_name(name))

    @cached_property
    def contents(self) -> str:
        """Digest of all samples' keys, images and labels, whatever their order and shards."""
        return digest_of(self.open_index().chunks())

    @cached_property
    def key_hashes(self) -> np.ndarray:
        """Sorted 64-bit hashes of the sample keys, uint64; of a set above 2**20 samples the smallest 2**20.

        Two sets that are cut so still show what share they have in common. Made in some 100 MiB at most.
        """
        smallest, found, count = np.zeros(0, dtype=np.uint64), [], 0
        for rows in self.open_index().chunks():
            hashes = rows["key_hash"]
            if len(smallest) == MAX_KEY_HASHES:
                hashes = hashes[hashes < smallest[-1]]
            found.append(hashes)
            count += len(hashes)
            if count >= MAX_KEY_HASHES:
                smallest, found, count = np.sort(np.concatenate([smallest, *found]))[:MAX_KEY_HASHES].copy(), [], 0
        smallest = np.sort(np.concatenate([smallest, *found]))[:MAX_KEY_HASHES].copy()
        return smallest

    def open_index(self) -> IndexFile:
        """Where each sample lies.

        Raises:
            ShardError: missing, damaged, or of another set.
        """
        index = IndexFile(self.index_path)
        if len(index) != self.num_samples:
            raise ShardError(f"the index {self.index_path} does not belong to {self.path}; make the shards again")
        return index

    def to_json(self) -> dict[str, Any]:
        """What the manifest file holds."""
        values = asdict(self)
        optional = ("notes", "tile_side", "tile_overlap", "classes", "classes_sha256")
        names = [field.name for field in fields(ManifestFile)]
        return {name: values[name] for name in names if values[name] or name not in optional}


_READER = TypeAdapter(ManifestFile)


def load_manifest(path: str | Path, *, cache: ShardCache | None = None, check_shards: bool = True) -> Manifest:
    """The manifest, after checking that it makes sense and that the index is there.

    Args:
        path: a file, or a URL of a kind that `downloads.fetch` takes.
        cache: where a URL's files come to lie; its shards come later, when they are read.
        check_shards: look at each shard's size too (see `check_sizes`): two calls to the file system per shard, which
            one process per node does for all.

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
        file = cache.fetch_manifest(str(path))
        content = parse_manifest(file)
        cache.fetch_beside(str(path), content.index, sha256=content.index_sha256)
        manifest = Manifest(**vars(content), path=file, url=str(path), cache=cache)
    else:
        file = Path(path).expanduser()
        manifest = Manifest(**vars(parse_manifest(file)), path=file)
    manifest.open_index()
    if check_shards:
        check_sizes(manifest)
    return manifest


def check_sizes(manifest: Manifest) -> None:
    """Check that all shards are there with the sizes of the manifest; those from a URL are checked when they come.

    Raises:
        ShardError: one is missing or of another size.
    """
    folder = os.fspath(manifest.path.parent)
    for number, shard in enumerate(() if manifest.cache else manifest.shards):
        size = _size_of(os.path.join(folder, shard.name))
        if size != shard.size_bytes:
            state = "is missing" if size is None else f"has {size:,} bytes, not {shard.size_bytes:,}"
            raise ShardError(f"the shard {manifest.shard_name(number)} {state}; copy it again or make the shards again")


def _size_of(file: str) -> int | None:
    """Bytes of a file, None where there is none; no `Path`, which takes three times as long as the system's answer."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def parse_manifest(path: Path) -> ManifestFile:
    """What a manifest file holds, every value checked.

    Raises:
        ShardError: no file, not a manifest, or one with values that can't be.
    """
    try:
        content = _READER.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ShardError(
            f"no manifest at {path}; `{command_name('shards')}` makes one from VOC folders, folders of images and "
            "masks, or lists"
        ) from None
    except ValidationError as error:
        raise ShardError(_explain(error, path)) from None
    except OSError as error:
        reason = error.strerror
        raise ShardError(f"{path} can't be read as a manifest ({reason}); give the .json beside the shards") from None
    if content.num_samples < 1:
        raise ShardError(f"the set {path} is empty; make the shards again from a list that names images")
    names = {shard.name for shard in content.shards}
    counted = sum(shard.num_samples for shard in content.shards)
    for wrong, problem in (
        (len(content.class_names) != content.num_classes, f"{len(content.class_names)} class_names"),
        (len(content.class_pixels) != content.num_classes, f"{len(content.class_pixels)} class_pixels"),
        (len(names) != len(content.shards), "a shard named twice"),
        (counted != content.num_samples, f"{format_count(counted, 'sample')} in its shards"),
        (bool(content.classes) != bool(content.classes_sha256), "one alone of classes and classes_sha256"),
        (content.classes == content.index, "one file for index and classes"),
    ):
        if wrong:
            raise ShardError(
                f"the manifest {path} of {format_count(content.num_classes, 'class', 'classes')} and "
                f"{format_count(content.num_samples, 'sample')} has {problem}; make the shards again"
            )
    return content


def _explain(error: ValidationError, path: Path) -> str:
    """What is wrong with a file that is not a manifest, as a sentence."""
    problems = error.errors(include_url=False)
    kinds = {problem["type"] for problem in problems}
    if "json_invalid" in kinds:
        return f"{path} can't be read as a manifest (it is not JSON); give the .json beside the shards"
    if ("dataclass_type" in kinds and problems[0]["loc"] == ()) or any(p["loc"] == ("format",) for p in problems):
        return f"{path} is not a {FORMAT!r} manifest; `{command_name('shards')}` writes one"
    where = [".".join(map(str, problem["loc"])) for problem in problems]
    if kinds & {"missing", "unexpected_keyword_argument"}:
        return (
            f"the manifest {path} does not fit this version of dist_deeplab (see {', '.join(where[:5])}); make the "
            "shards again"
        )
    value = json.dumps(problems[0]["input"], default=str)
    reason = problems[0]["msg"].removeprefix("Value error, ")
    if problems[0]["type"] == "string_pattern_mismatch":
        reason = "neither the name of a file beside it nor a digest of 64 hexadecimal digits"
    return f"the manifest {path} has {where[0]} = {value[:80]}: {reason}; make the shards again"


def save_manifest(manifest: Manifest) -> None:
    """Write the manifest's file, whole or not at all."""
    replace_text(manifest.path, json.dumps(manifest.to_json(), indent=1) + "\n")


def require_fit(manifest: Manifest, *, num_classes: int, ignore_label: int) -> None:
    """Check that the shards' labels are what the model is configured for.

    Raises:
        ShardError: another number of classes or another void label.
    """
    if manifest.num_classes != num_classes:
        raise ShardError(
            f"{manifest.path} holds {format_count(manifest.num_classes, 'class', 'classes')} but the model has "
            f"{num_classes}; set data.num_classes={manifest.num_classes} "
            "(and model.restore_last=false if the weights have other classes)"
        )
    if manifest.ignore_label != ignore_label:
        raise ShardError(
            f"{manifest.path} marks void by {manifest.ignore_label}, not {ignore_label}; set "
            f"data.ignore_label={manifest.ignore_label}"
        )
