"""A finished set looked at again: does it hold what its manifest says, and what does that look like?"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dist_deeplab.data.decode import DecodeError, decode_label, decode_packed, read_image_file
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.packing.ordered_map import ordered_map
from dist_deeplab.data.shards.keys import keys_digest
from dist_deeplab.data.shards.manifest import Manifest, ShardError
from dist_deeplab.data.shards.presence import SetContents, read_presence
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.errors import UserError
from dist_deeplab.files import sha256
from dist_deeplab.logs import format_count


class SampleContent(NamedTuple):
    """What one sample holds: its key, height and width, pixels of each class int64 [num_classes], void pixels."""

    key: str
    size: tuple[int, int]
    class_pixels: np.ndarray
    num_void: int


def verify(
    manifest: Manifest, *, workers: int = 1, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Iterator[str]:
    """Yield every problem of the set, one sentence each; nothing where it is sound.

    Checked: each shard's and the index's SHA-256; each sample's checksums, headers, decodability, sizes, labels; the
    manifest's numbers of samples and pixels, its digest of the keys, and its file of the samples' classes.
    """
    if sha256(manifest.index_path) != manifest.index_sha256:
        yield f"the index {manifest.index_path} does not have the SHA-256 of the manifest"
    for number, shard in enumerate(manifest.shards):
        if manifest.cache is None and sha256(manifest.path.with_name(shard.name)) != shard.sha256:
            yield f"the shard {manifest.shard_name(number)} does not have the SHA-256 of the manifest"
    keys = []
    contents = SetContents(manifest.num_classes)
    for seen in inspect_set(manifest, check_readers=True, workers=workers, progress=progress):
        if isinstance(seen, UserError):
            yield str(seen)
        else:
            keys.append(seen.key)
            contents.add(seen.class_pixels)
    if len(keys) < manifest.num_samples:  # already named: the sums below can't be right
        return
    if keys_digest(keys) != manifest.keys_sha256:
        yield f"the keys do not have the digest that {manifest.path} says"
    if len(set(keys)) != len(keys):
        yield f"{format_count(len(keys) - len(set(keys)), 'key comes', 'keys come')} more than once"
    if tuple(contents.class_pixels.tolist()) != manifest.class_pixels:
        yield f"the pixels of the classes are not those that {manifest.path} says"
    if manifest.classes:
        try:
            if not np.array_equal(read_presence(manifest), contents.presence):
                yield f"the classes of the samples are not those that {manifest.classes_path} says"
        except ShardError as error:
            yield str(error)


def inspect_set(
    manifest: Manifest,
    *,
    check_readers: bool = False,
    workers: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Iterator["SampleContent | UserError"]:
    """Yield what each sample holds, or what is wrong with it, in the order of the index.

    check_readers: an image is also wrong whose EXIF orientation, transparency or 16 bits not all readers treat alike.
    """
    look = functools.partial(_look, ShardReader(manifest), check_readers=check_readers)
    return ordered_map(look, progress(range(manifest.num_samples)), workers=workers)


def _look(reader: ShardReader, index: int, *, check_readers: bool) -> "SampleContent | UserError":
    try:
        image, label, key = load_sample(reader, index)
        if check_readers:
            _require_one_meaning(reader, index, image)
        labels = LabelSpace(reader.manifest.class_names, reader.manifest.ignore_label)
        counts = labels.count(label, where=f"sample {key!r} in {reader.shard_name(index)}")
        return SampleContent(key, (image.shape[0], image.shape[1]), counts, int((label == labels.ignore_label).sum()))
    except UserError as error:
        return error


def _require_one_meaning(reader: ShardReader, index: int, stored: np.ndarray) -> None:
    """Check that prediction would decode a shard's image to the pixels that training sees, `stored`."""
    sample = reader.read(index)
    decoded = read_image_file(sample.image)
    if np.array_equal(decoded.pixels, stored):
        return
    orientation = f"an EXIF orientation ({decoded.orientation})"
    what = orientation if decoded.orientation != 1 else "transparency or more than 8 bits"
    raise ShardError(
        f"sample {sample.key!r} in {reader.shard_name(index)}: the image has {what}, which prediction applies, but "
        "training on these shards and other readers of them ignore; pack its files by `dist-deeplab shards`, which "
        "stores pixels that mean one thing (or index --exif ignore, if the masks were drawn on the stored pixels)"
    )


def load_sample(reader: ShardReader, index: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Image uint8 [H, W, 3], label uint8 [H, W] and key of a sample.

    Raises:
        ShardError: unreadable, undecodable, or of two sizes.
    """
    sample = reader.read(index)
    where = f"sample {sample.key!r} in {reader.shard_name(index)}"
    try:
        image, label = decode_packed(sample.image), decode_label(sample.label)
    except DecodeError as error:
        raise ShardError(f"{where}: {error}") from None
    if image.shape[:2] != label.shape:
        raise ShardError(f"{where}: image {image.shape[:2]} and label {label.shape} differ in size")
    return image, label, sample.key
