"""Where each sample's bytes lie in WebDataset tars, whoever made them."""

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_deeplab.data.shards.index_file import IndexWriter, ShardError
from dist_deeplab.data.shards.keys import DuplicateKeyError, key_hash, unique_keys_digest
from dist_deeplab.data.shards.reader import PNG_HEADER_BYTES, png_size, split_name

IMAGE_MEMBERS = ("jpg", "jpeg", "rgb.png", "image.png", "img.png", "image.jpg", "img.jpg", "png", "webp")
LABEL_MEMBERS = ("seg.png", "mask.png", "label.png", "labels.png", "gt.png", "segmentation.png", "png")


class MemberNames(NamedTuple):
    """What follows a key in the names of a sample's members."""

    image: str
    label: str


OURS = (MemberNames("jpg", "png"), MemberNames("rgb.png", "png"))
"""What `shard_writer` writes: images that are JPEGs, and others."""


class IndexedTars(NamedTuple):
    """What an index is of: samples of each tar, and the digest of all keys (see `keys_digest`)."""

    samples_per_tar: list[int]
    keys_sha256: str


def build_index(
    tars: Sequence[Path],
    path: Path,
    *,
    members: Sequence[MemberNames] = OURS,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> IndexedTars:
    """Write to `path` where each sample lies in the tars, in tar order; memory for one tar is enough.

    Args:
        tars: uncompressed tar files.
        path: of a new `.npy` file of INDEX_DTYPE.
        members: the names by which a sample's members are known; the first that fits an image counts.
        progress: wraps the tars, to show how far this is.

    Raises:
        ShardError: a tar that can't be read, a sample without its image or label, a key twice or with a line
            break.
    """
    samples_per_tar: list[int] = []

    def indexed_keys(index: IndexWriter) -> Iterator[str]:
        for shard, tar in enumerate(progress(tars)):
            samples = _samples_in(tar, members)
            index.append([(shard, *_record(tar, key, *found)) for key, found in samples.items()])
            samples_per_tar.append(len(samples))
            yield from samples

    try:
        with IndexWriter(path) as index:
            return IndexedTars(samples_per_tar, unique_keys_digest(indexed_keys(index)))
    except DuplicateKeyError as error:
        raise ShardError(f"the key {error.args[0]!r} comes twice in the tars; keys must be unique") from None


def _record(tar: Path, key: str, image: tarfile.TarInfo, label: tarfile.TarInfo) -> tuple[int, ...]:
    """A sample's entry in the index, behind the number of its shard."""
    if "\n" in key:
        raise ShardError(f"{tar} holds the key {key!r} with a line break; rename it")
    with tar.open("rb") as file:
        image_crc32, label_crc32 = (zlib.crc32(_content(file, member, tar)) for member in (image, label))
        file.seek(label.offset_data)
        size = png_size(file.read(PNG_HEADER_BYTES)) or (0, 0)  # unknown: whoever decodes it will say what it is
    places = image.offset, image.offset_data, image.size, label.offset_data, label.size
    return *places, image_crc32, label_crc32, key_hash(key), *size


def _content(file: BinaryIO, member: tarfile.TarInfo, tar: Path) -> bytes:
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) != member.size:
        raise ShardError(f"{tar} ends inside {member.name}; copy it again")
    return content


def find_members(tar: Path, *, image: str | None = None, label: str | None = None) -> MemberNames:
    """What the members of a tar's first sample with image and label are called after the key.

    Args:
        tar: the file.
        image: what the image is called, if the user said so.
        label: what the label is called, if the user said so.

    Raises:
        ShardError: no sample has members of known names.
    """
    endings: dict[str, list[str]] = {}
    for member in _members(tar):
        key, ending = split_name(member.name)
        endings.setdefault(key, []).append(ending)
    for there in endings.values():
        for label_name in [label] if label else LABEL_MEMBERS:
            for image_name in [image] if image else IMAGE_MEMBERS:
                if image_name in there and label_name in there and image_name != label_name:
                    return MemberNames(image_name, label_name)
    seen = ", ".join(sorted({ending for there in endings.values() for ending in there})[:12]) or "none"
    raise ShardError(
        f"{tar} holds no sample with an image ({image or '|'.join(IMAGE_MEMBERS)}) and a label "
        f"({label or '|'.join(LABEL_MEMBERS)}) under one key; the endings there are: {seen}; see --image and --label"
    )


def _samples_in(path: Path, members: Sequence[MemberNames]) -> dict[str, tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """Key -> image and label member, in the order of the images."""
    by_name: dict[str, tarfile.TarInfo] = {}
    wanted = {ending for names in members for ending in names}
    for member in _members(path):
        if member.name in by_name and split_name(member.name)[1] in wanted:
            raise ShardError(f"{path} holds {member.name} twice; keys must be unique")
        by_name[member.name] = member
    samples: dict[str, tuple[tarfile.TarInfo, tarfile.TarInfo]] = {}
    labels_used = set()
    for name, image in by_name.items():
        key, ending = split_name(name)
        label_name = next((names.label for names in members if names.image == ending), None)
        if label_name is None:
            continue
        label = by_name.get(f"{key}.{label_name}")
        if label is None:
            raise ShardError(f"{path} holds {name} but not {key}.{label_name}; a sample needs both")
        if key in samples:
            raise ShardError(f"{path} holds two images of the sample {key!r}; keys must be unique")
        samples[key] = image, label
        labels_used.add(label.name)
    known = {names.label for names in members}
    for name in by_name:
        if split_name(name)[1] in known and name not in labels_used:
            raise ShardError(f"{path} holds {name} but no image beside it; a sample needs both")
    return samples


def _members(path: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            return [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise ShardError(f"{path} is compressed, which allows no random access; gunzip it first") from None
        raise ShardError(f"{path} is not a readable tar file ({error})") from None
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}") from None
