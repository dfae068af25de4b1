"""WebDataset tars made elsewhere become a set: index and manifest beside them, after every sample was decoded.

A set that has no file of its samples' classes gets one (`add_presence`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.verify import SampleContent, inspect_set
from dist_deeplab.data.packing.writer import Draft, write_manifest
from dist_deeplab.data.shards.index import find_members
from dist_deeplab.data.shards.manifest import Manifest, Shard, ShardError, load_manifest, parse_manifest
from dist_deeplab.data.shards.presence import SetContents, save_with_presence
from dist_deeplab.data.windows import Windows


@dataclass(frozen=True)
class IndexingOptions:
    """How the members of tars are found and checked.

    image: what follows the key in an image's name; None: the first known one that is there. label: the same for labels.
    check_readers: refuse images whose EXIF orientation, transparency or 16 bits some readers apply and others do not;
    else they are trained on as they are stored. overwrite: replace a manifest of this name; what it says of the packing
    of these tars (notes, tiles) is kept. workers: processes that decode.
    """

    image: str | None = None
    label: str | None = None
    check_readers: bool = True
    overwrite: bool = False
    workers: int = 1


DEFAULT_OPTIONS = IndexingOptions()


def index_tars(
    tars: Sequence[Path],
    *,
    split: str,
    labels: LabelSpace,
    options: IndexingOptions = DEFAULT_OPTIONS,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Manifest:
    """Write index and manifest beside the tars, which stay as they are, and return the manifest.

    Args:
        tars: uncompressed, all in one folder; labels are 8-bit greyscale or palette PNGs of class indices.
        split: the set's name.
        labels: what labels may be.
        options: how it is done.
        progress: wraps the samples, to show how far this is.

    Raises:
        ShardError: no tar, not in one folder, samples that are incomplete or can't be trained on (the first is named).
    """
    folders = {tar.parent.resolve() for tar in tars}
    if len(folders) != 1:
        raise ShardError(f"the tars lie in {len(folders)} folders; a set lies in one, with its manifest")
    if len({tar.name for tar in tars}) != len(tars):
        raise ShardError("a tar is named twice")
    missing = next((tar for tar in tars if not tar.is_file()), None)
    if missing is not None:
        raise ShardError(f"there is no file {missing}")
    final = tars[0].parent / f"{split}.json"
    if final.exists() and not options.overwrite:
        raise ShardError(f"{final} is there already; nothing was written (--overwrite replaces it)")
    members = [find_members(tars[0], image=options.image, label=options.label)]
    draft = final.with_name(f".{split}.draft.json")
    unknown, contents = SetContents(len(labels.class_names)), SetContents(len(labels.class_names))
    try:
        # 1. A draft, by which samples can be read; 2. all of them decoded and counted; 3. the manifest.
        write_manifest(tars, draft, Draft(split, labels, unknown), members=members)
        found = inspect_set(
            load_manifest(draft), check_readers=options.check_readers, workers=options.workers, progress=progress
        )
        for seen in found:
            if not isinstance(seen, SampleContent):
                raise seen
            contents.add(seen.class_pixels)
        notes, tiles = _packing_of(load_manifest(draft).shards, final)
        write_manifest(tars, final, Draft(split, labels, contents, notes, tiles), members=members)
    finally:
        draft.unlink(missing_ok=True)
        draft.with_suffix(".index.npy").unlink(missing_ok=True)
    return load_manifest(final)


def _packing_of(shards: Sequence[Shard], replaced: Path) -> tuple[tuple[str, ...], Windows | None]:
    """Notes and tiles of the manifest that is replaced, where tars of it are among these; else nothing is known."""
    try:
        before = parse_manifest(replaced)
    except ShardError:  # none there, or one that says nothing
        return (), None
    if {shard.sha256 for shard in shards}.isdisjoint(shard.sha256 for shard in before.shards):
        return (), None
    return before.notes, Windows(before.tile_side, before.tile_overlap) if before.tile_side else None


def add_presence(
    manifest: Manifest, *, workers: int = 1, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Manifest:
    """Write the file of which classes each sample contains beside a set's manifest, and name it there.

    Raises:
        ShardError: a sample is damaged, or the classes' pixels are not those of the manifest.
    """
    contents = SetContents(manifest.num_classes)
    for seen in inspect_set(manifest, workers=workers, progress=progress):
        if not isinstance(seen, SampleContent):
            raise seen
        contents.add(seen.class_pixels)
    if tuple(contents.class_pixels.tolist()) != manifest.class_pixels:
        raise ShardError(f"the pixels of the classes are not those that {manifest.path} says; make the shards again")
    save_with_presence(manifest, contents)
    return load_manifest(manifest.path)
