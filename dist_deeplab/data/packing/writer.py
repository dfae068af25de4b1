"""Image and label files -> WebDataset shards with index and manifest.

Everything is checked before it is written, and nothing carries its final name before it is complete: shards and
index first, the manifest last. A killed run leaves a hidden folder that the next one removes, never half a set.
The bytes depend on the samples and the size of a shard alone, not on the number of processes, the time or the machine.
"""

import functools
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import webdataset

from dist_deeplab.command_line import command_name
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.ordered_map import ordered_map
from dist_deeplab.data.packing.samples import AS_THEY_ARE, Packed, PackedFile, Reading, pack_sample
from dist_deeplab.data.packing.sources import SourceSample
from dist_deeplab.data.shards.index import OURS, MemberNames, build_index
from dist_deeplab.data.shards.manifest import Manifest, Shard, ShardError, load_manifest, save_manifest
from dist_deeplab.data.shards.presence import SetContents, save_with_presence
from dist_deeplab.data.windows import Windows
from dist_deeplab.files import fsync, replace_file, sha256
from dist_deeplab.logs import format_count

_MTIME = 0  # one fixed time for all members: the same input gives the same bytes; as a float it would need PAX headers

DEFAULT_SAMPLES = 500  # of VOC: some 60 MB

Progress = Callable[[Iterable[SourceSample]], Iterable[SourceSample]]


@dataclass
class PackingCounts:
    """What packing did to all images, for the manifest: see `PackedFile`."""

    num_images: int = 0
    num_turned: int = 0
    num_against_options: int = 0
    num_reencoded: int = 0
    num_void_tiles: int = 0

    def add(self, file: PackedFile) -> None:
        """Count one image."""
        self.num_images += 1
        self.num_turned += file.turned
        self.num_against_options += file.against_options
        self.num_reencoded += file.reencoded
        self.num_void_tiles += file.void_tiles

    def sentences(self, reading: Reading) -> tuple[str, ...]:
        """What a user should know, one sentence each; none where all images went in as they are."""
        turned = self.num_turned - (0 if reading.options.upright else self.num_against_options)
        notes = []
        if turned:
            notes.append(
                f"{format_count(turned, 'image')} turned upright (EXIF orientation): masks are drawn on what people "
                "see (--exif ignore if yours were drawn on the stored pixels)"
            )
        if self.num_against_options:
            way = "not turned" if reading.options.upright else "turned"
            notes.append(
                f"{format_count(self.num_against_options, 'image')} {way} upright, because masks fit only that way"
            )
        if reading.tiles is not None:
            side, overlap = reading.tiles.side, reading.tiles.overlap
            notes.append(
                f"{format_count(self.num_images, 'image')} cut into tiles of {side} pixels that overlap by {overlap} "
                f"or more where a side is longer; {format_count(self.num_void_tiles, 'tile')} of void alone left out"
            )
        elif self.num_reencoded:
            notes.append(
                f"{format_count(self.num_reencoded, 'image')} stored as RGB PNG, so that every reader sees the same "
                "pixels"
            )
        return tuple(notes)


@dataclass(frozen=True)
class PackingOptions:
    """How a set is written.

    reading: how files become samples. samples_per_shard: a shard is full at this many samples, max_shard_bytes: or
    before its members would have more bytes than this. overwrite: replace a set of this name. workers: processes; they
    change nothing but the time.
    """

    reading: Reading = AS_THEY_ARE
    samples_per_shard: int = DEFAULT_SAMPLES
    max_shard_bytes: int | None = None
    overwrite: bool = False
    workers: int = 1


DEFAULT_OPTIONS = PackingOptions()


def write_shards(
    samples: Sequence[SourceSample],
    out: Path,
    *,
    split: str,
    labels: LabelSpace,
    options: PackingOptions = DEFAULT_OPTIONS,
    progress: Progress = iter,
) -> Manifest:
    """Check all samples, write them to `out`, and return the manifest.

    Args:
        samples: in the order in which they are written.
        out: folder, made if missing.
        split: the set's name.
        labels: what masks may hold.
        options: how it is done.
        progress: wraps the samples, to show how far this is.

    Raises:
        ShardError: no samples; one twice; a file missing, damaged or of a wrong kind; sizes of image and label that
            differ; a label out of range; a set `split` that is there already and is not to be replaced.
    """
    check_samples(samples, split=split)
    final = out / f"{split}.json"
    if final.exists() and not options.overwrite:
        raise ShardError(f"{final} is there already; nothing was written (--overwrite replaces the set)")
    scratch = out / f".{split}.unfinished"
    killed_while_moving = (scratch / final.name).exists()  # then the tars beside it are of the set that was moved
    if not options.overwrite and not killed_while_moving and (tars := _tars_of(final)):
        raise ShardError(
            f"{tars[0]} is there already, without a manifest {final.name}; nothing was written: move it, index it by "
            f"`{command_name('shards')} index`, or add --overwrite to replace it"
        )
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        counts = PackingCounts()
        packed = _counted(
            ordered_map(
                functools.partial(pack_sample, labels=labels, reading=options.reading),
                progress(samples),
                workers=options.workers,
            ),
            counts,
        )
        contents = SetContents(len(labels.class_names))
        _write_tars(packed, scratch, contents, split=split, options=options)
        draft = Draft(split, labels, contents, counts.sentences(options.reading), options.reading.tiles)
        write_manifest(sorted(scratch.glob("*.tar")), scratch / final.name, draft)
        _publish(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_manifest(final)


def check_samples(samples: Sequence[SourceSample], *, split: str) -> None:
    """Check keys and that all files are there, before any is read.

    Raises:
        ShardError: see `write_shards`.
    """
    if not samples:
        raise ShardError(f"the split {split!r} names no samples; nothing was written")
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


def _counted(files: Iterable[PackedFile], counts: PackingCounts) -> Iterator[Packed]:
    for file in files:
        counts.add(file)
        yield from file.samples


def _write_tars(
    packed: Iterable[Packed], folder: Path, contents: SetContents, *, split: str, options: PackingOptions
) -> None:
    """Write the samples to `<split>-000000.tar ...`, and add what each one contains to `contents`."""
    pattern = str(folder / split).replace("%", "%%") + "-%06d.tar"
    max_count, max_bytes = options.samples_per_shard, options.max_shard_bytes
    with webdataset.ShardWriter(pattern, maxcount=max_count, maxsize=2**62, mtime=_MTIME, verbose=0) as writer:
        for sample in packed:
            num_bytes = sum(map(len, sample.members.values()))
            if max_bytes and writer.count and writer.size + num_bytes > max_bytes:
                writer.next_stream()
            writer.write({"__key__": sample.key, **sample.members})
            contents.add(sample.class_pixels)


@dataclass(frozen=True)
class Draft:
    """What a manifest says beside what its tars show: see `Manifest`.

    contents: of all samples, or empty where they are not known yet; then no file of classes is written.
    """

    split: str
    labels: LabelSpace
    contents: SetContents
    notes: tuple[str, ...] = ()
    tiles: Windows | None = None


def write_manifest(tars: Sequence[Path], path: Path, draft: Draft, *, members: Sequence[MemberNames] = OURS) -> None:
    """Write the manifest `path`, `<name>.json`, beside the tars; before it `<name>.index.npy` and `<name>.classes.npy`.

    Raises:
        ShardError: see `build_index`; or the tars hold no samples.
    """
    index_path = path.with_suffix(".index.npy")
    indexed = replace_file(index_path, lambda temporary: build_index(tars, temporary, members=members))
    if not sum(indexed.samples_per_tar):
        raise ShardError(f"there are no samples in {', '.join(map(str, tars[:3]))}")
    manifest = Manifest(
        split=draft.split,
        num_samples=sum(indexed.samples_per_tar),
        num_classes=len(draft.labels.class_names),
        ignore_label=draft.labels.ignore_label,
        class_names=draft.labels.class_names,
        class_pixels=tuple(draft.contents.class_pixels.tolist()),
        keys_sha256=indexed.keys_sha256,
        index=index_path.name,
        index_sha256=sha256(index_path),
        shards=tuple(
            Shard(tar.name, count, tar.stat().st_size, sha256(tar))
            for tar, count in zip(tars, indexed.samples_per_tar, strict=True)
        ),
        notes=draft.notes,
        tile_side=draft.tiles.side if draft.tiles else 0,
        tile_overlap=draft.tiles.overlap if draft.tiles else 0,
        path=path,
    )
    for tar in tars:
        fsync(tar)
    if draft.contents.num_samples:
        save_with_presence(manifest, draft.contents)
    else:
        save_manifest(manifest)


def _tars_of(final: Path) -> list[Path]:
    """The tars beside a manifest that have the names of its set's shards, whoever made them."""
    return sorted(final.parent.glob(f"{glob.escape(final.stem)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"))


def _publish(scratch: Path, final: Path) -> None:
    """Move the finished files beside `final`, the manifest last; remove the shards of a set that is replaced."""
    final.unlink(missing_ok=True)  # 1. from here to 3. there is no set, rather than a mixed one
    for old in _tars_of(final):
        old.unlink()
    for file in sorted(scratch.iterdir()):  # 2.
        if file.name != final.name:
            os.replace(file, final.parent / file.name)
    os.replace(scratch / final.name, final)  # 3.
    fsync(final.parent)
