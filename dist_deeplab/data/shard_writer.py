"""Image and label files -> WebDataset shards with index and manifest.

Everything is checked before it is written, and nothing carries its final name before it is complete: shards and
index first, the manifest last. A killed run leaves a hidden folder that the next one removes, never half a set.
"""

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset

from dist_deeplab.data.decode import DecodeError, decode_image, decode_label, encode_label
from dist_deeplab.data.shards import INDEX_DTYPE, Manifest, Shard, ShardError, keys_digest
from dist_deeplab.files import fsync, sha256

_MAX_CLASSES = 255  # 8 bits less the void label
_MTIME = 0  # one fixed time for all members: the same input gives the same bytes; as a float it would need PAX headers


@dataclass(frozen=True)
class SourceSample:
    """A sample still lying in folders."""

    key: str
    image: Path
    label: Path


@dataclass(frozen=True)
class LabelSpace:
    """What a label pixel may be: a class index under `len(class_names)`, or `ignore_label`."""

    class_names: tuple[str, ...]
    ignore_label: int

    def __post_init__(self) -> None:
        if len(self.class_names) > _MAX_CLASSES:
            raise ShardError(
                f"{len(self.class_names)} classes don't fit into an 8-bit label; {_MAX_CLASSES} do, and void"
            )

    def count(self, label: np.ndarray, *, where: str) -> np.ndarray:
        """Return the pixels of each class, int64 [num_classes].

        Raises:
            ShardError: a pixel is neither a class nor void.
        """
        histogram = np.bincount(label.ravel(), minlength=256)
        num_classes = len(self.class_names)
        allowed = np.zeros(256, dtype=bool)
        allowed[:num_classes] = allowed[self.ignore_label] = True
        strange = np.flatnonzero((histogram > 0) & ~allowed)
        if strange.size:
            raise ShardError(
                f"{where} holds the label {strange[0]}, but classes are 0..{num_classes - 1} and void is "
                f"{self.ignore_label}; set the number of classes or mend the mask"
            )
        histogram[self.ignore_label] = 0
        return histogram[:num_classes].astype(np.int64)


def read_voc_list(voc_root: Path, split: str) -> list[SourceSample]:
    """Return the samples of `ImageSets/Segmentation/<split>.txt` in a VOCdevkit/VOC2012 folder.

    Raises:
        ShardError: no such folder or list.
    """
    listing = voc_root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not voc_root.is_dir():
        raise ShardError(f"there is no folder {voc_root}; give the one that holds JPEGImages, e.g. VOCdevkit/VOC2012")
    if not listing.is_file():
        there = ", ".join(sorted(file.stem for file in listing.parent.glob("*.txt"))) or "none"
        raise ShardError(f"there is no list {listing}; lists there: {there}")
    keys = read_lines(listing)
    return [
        SourceSample(key, voc_root / "JPEGImages" / f"{key}.jpg", voc_root / "SegmentationClass" / f"{key}.png")
        for key in keys
        if key
    ]


def read_pair_list(data_root: Path, listing: Path) -> list[SourceSample]:
    """Return the samples of a file with one `image label` pair of paths a line, under `data_root` (DrSleep's format).

    Blank lines and CRLF are tolerated; a leading slash means `data_root`, as there. The key is the image's file name
    without its ending.

    Raises:
        ShardError: no such file, or a line that is not a pair.
    """
    if not listing.is_file():
        raise ShardError(f"there is no list file {listing}")
    samples = []
    for number, line in enumerate(read_lines(listing), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise ShardError(f"line {number} of {listing} is not an `image label` pair: {line.strip()!r}")
        image, label = (data_root / part.lstrip("/") for part in parts)
        samples.append(SourceSample(image.stem, image, label))
    return samples


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file without the white space around them; CRLF and a byte order mark are tolerated.

    Raises:
        ShardError: the file is not UTF-8 text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ShardError(f"{path} is not UTF-8 text; convert it, e.g. with iconv") from None


def write_shards(
    samples: Sequence[SourceSample],
    out: Path,
    *,
    split: str,
    labels: LabelSpace,
    samples_per_shard: int,
    overwrite: bool = False,
    progress: Callable[[Iterable[SourceSample]], Iterable[SourceSample]] = iter,
) -> Manifest:
    """Check all samples, write them to `out`, and return the manifest.

    Raises:
        ShardError: no samples; one twice; a file missing, damaged or of a wrong kind; sizes of image and label that
            differ; a label out of range; a set `split` that is there already and `overwrite` is false.
    """
    if not samples:
        raise ShardError(f"the split {split!r} names no samples; nothing was written")
    _check_keys_and_files(samples)
    final = out / f"{split}.json"
    if final.exists() and not overwrite:
        raise ShardError(f"{final} is there already; nothing was written (--overwrite replaces the set)")
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / f".{split}.unfinished"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        class_pixels = np.zeros(len(labels.class_names), dtype=np.int64)
        pattern = str(scratch / split).replace("%", "%%") + "-%06d.tar"
        with webdataset.ShardWriter(
            pattern, maxcount=samples_per_shard, maxsize=2**40, mtime=_MTIME, verbose=0
        ) as writer:
            for sample in progress(samples):
                image, label, counts = _load_checked(sample, labels)
                class_pixels += counts
                writer.write({"__key__": sample.key, "jpg": image, "png": label})
        tars = sorted(scratch.glob("*.tar"))
        index, keys = build_index(tars)
        np.save(scratch / f"{split}.index.npy", index)
        manifest = Manifest(
            split=split,
            num_samples=len(keys),
            num_classes=len(labels.class_names),
            ignore_label=labels.ignore_label,
            class_names=labels.class_names,
            class_pixels=tuple(int(n) for n in class_pixels),
            keys_sha256=keys_digest(keys),
            index=f"{split}.index.npy",
            shards=tuple(
                Shard(tar.name, int(np.sum(index["shard"] == i)), tar.stat().st_size, sha256(tar))
                for i, tar in enumerate(tars)
            ),
            path=final,
        )
        (scratch / final.name).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
        _publish(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def build_index(tars: Sequence[Path]) -> tuple[np.ndarray, list[str]]:
    """Return where each sample lies in the tars (INDEX_DTYPE [n], in tar order) and the keys.

    Raises:
        ShardError: a tar that can't be read, or a sample without its image or label.
    """
    rows: list[tuple[int, int, int, int, int, int]] = []
    keys: list[str] = []
    for shard, path in enumerate(tars):
        try:
            with tarfile.open(path, "r:") as tar:
                members = {m.name: m for m in tar if m.isfile()}
        except tarfile.TarError as error:
            raise ShardError(f"{path} is not a readable tar file ({error})") from None
        for name, image in members.items():
            key, _, ending = name.rpartition(".")
            if ending != "jpg":
                continue
            label = members.get(f"{key}.png")
            if label is None:
                raise ShardError(f"{path} holds {name} but not {key}.png; a sample needs both")
            rows.append((shard, image.offset, image.offset_data, image.size, label.offset_data, label.size))
            keys.append(key)
    return np.array(rows, dtype=INDEX_DTYPE), keys


def _check_keys_and_files(samples: Sequence[SourceSample]) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ShardError(f"the sample {sample.key!r} is listed twice; keys must be unique")
        if not sample.key or set(sample.key) & set("./ "):
            raise ShardError(
                f"the key {sample.key!r} holds a dot, slash or space, which ends a key in WebDataset; rename"
            )
        seen.add(sample.key)
        for kind, path in (("image", sample.image), ("label", sample.label)):
            if not path.is_file():
                raise ShardError(f"the {kind} {path} of sample {sample.key!r} does not exist")


def _load_checked(sample: SourceSample, labels: LabelSpace) -> tuple[bytes, bytes, np.ndarray]:
    """Return the image's own bytes, the label as 8-bit index PNG bytes, and its class pixels."""
    image = sample.image.read_bytes()
    if not image.startswith(b"\xff\xd8"):
        raise ShardError(f"the image {sample.image} is not a JPEG; convert it first")
    try:
        height, width = decode_image(image).shape[:2]
    except DecodeError as error:
        raise ShardError(f"{sample.image}: {error}") from None
    try:
        label = decode_label(sample.label.read_bytes())
    except DecodeError as error:
        raise ShardError(f"{sample.label}: {error}") from None
    if label.shape != (height, width):
        raise ShardError(
            f"sizes differ: {sample.image} is {width}x{height}, {sample.label} is {label.shape[1]}x{label.shape[0]}"
        )
    return image, encode_label(label), labels.count(label, where=str(sample.label))


def _publish(scratch: Path, final: Path) -> None:
    """Move the finished files beside `final`, the manifest last; remove the shards of a set that is replaced."""
    final.unlink(missing_ok=True)  # 1. from here to 3. there is no set, rather than a mixed one
    split = final.stem
    for old in final.parent.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        old.unlink()
    for file in sorted(scratch.iterdir()):  # 2.
        fsync(file)
        if file.name != final.name:
            os.replace(file, final.parent / file.name)
    os.replace(scratch / final.name, final)  # 3.
    fsync(final.parent)
