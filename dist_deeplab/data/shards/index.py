"""Where each sample's bytes lie in WebDataset tars, whoever made them."""

import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dist_deeplab.data.shards.manifest import INDEX_DTYPE, ShardError, key_hash
from dist_deeplab.data.shards.reader import split_name

IMAGE_MEMBERS = ("jpg", "jpeg", "rgb.png", "image.png", "img.png", "image.jpg", "img.jpg", "png", "webp")
LABEL_MEMBERS = ("seg.png", "mask.png", "label.png", "labels.png", "gt.png", "segmentation.png", "png")
_MAX_BLOCK = 2**20


class MemberNames(NamedTuple):
    """What follows a key in the names of a sample's members."""

    image: str
    label: str


OURS = (MemberNames("jpg", "png"), MemberNames("rgb.png", "png"))
"""What `shard_writer` writes: images that are JPEGs, and others."""


def build_index(
    tars: Sequence[Path],
    *,
    members: Sequence[MemberNames] = OURS,
    progress: Callable[[Iterable[Path]], Iterable[Path]] = iter,
) -> tuple[np.ndarray, list[str]]:
    """Return where each sample lies in the tars (INDEX_DTYPE [n], in tar order) and the keys.

    Args:
        tars: uncompressed tar files.
        members: the names by which a sample's members are known; the first that fits an image counts.
        progress: wraps the tars, to show how far this is.

    Raises:
        ShardError: a tar that can't be read, a sample without its image or label, or a key twice.
    """
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    for shard, path in enumerate(progress(tars)):
        for key, (image, label) in _samples_in(path, members).items():
            places = image.offset, image.offset_data, image.size, label.offset_data, label.size
            rows.append((shard, *places, *_checksums(path, image, label), key_hash(key)))
            keys.append(key)
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ShardError(f"the key {twice!r} comes twice in the tars; keys must be unique")
    return np.array(rows, dtype=INDEX_DTYPE), keys


def find_members(tar: Path, *, image: str | None = None, label: str | None = None) -> MemberNames:
    """Return what the members of a tar's first sample with image and label are called after the key.

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
    """Return key -> image and label member, in the order of the images."""
    by_name = {member.name: member for member in _members(path)}
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


def _checksums(path: Path, *members: tarfile.TarInfo) -> list[int]:
    sums = []
    with path.open("rb") as file:
        for member in members:
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) != member.size:
                raise ShardError(f"{path} ends inside {member.name}; copy it again")
            sums.append(zlib.crc32(content))
    return sums
