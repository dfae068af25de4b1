"""What make_shards prints: progress on stderr, tables on stdout."""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dist_deeplab.data.packing.label_statistics import LabelStatistics
from dist_deeplab.data.packing.labels import LabelSpace
from dist_deeplab.data.repeat import RepeatFactors
from dist_deeplab.data.shards.manifest import Manifest
from dist_deeplab.logs import format_count, format_names

T = TypeVar("T")


def show_progress(description: str) -> Callable[[Iterable[T]], Iterable[T]]:
    """A function that yields its items under a progress bar on stderr (silent where that is not a terminal)."""

    def track(items: Iterable[T]) -> Iterable[T]:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = Console(stderr=True)
        total = len(items) if isinstance(items, Sized) else None
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield from progress.track(items, total=total, description=description)

    return track


def print_statistics(statistics: LabelStatistics, labels: LabelSpace, *, title: str) -> None:
    """Print pixels and images of every class and of void, before anything is written."""
    _class_table(labels, statistics.pixels, statistics.images, title)


def print_manifest(manifest: Manifest) -> None:
    """Print where the set is."""
    console = Console(markup=False)
    text = f"{manifest.path}: {size_of(manifest)}, {manifest.size_bytes / 1e6:,.1f} MB"
    console.print(text, soft_wrap=True, highlight=False)
    for note in manifest.notes:
        _warn(console, note)


def size_of(manifest: Manifest) -> str:
    """Numbers of samples and shards."""
    return f"{format_count(manifest.num_samples, 'sample')} in {format_count(len(manifest.shards), 'shard')}"


def print_note(text: str) -> None:
    """Print a note, if there is one."""
    if text:
        _warn(Console(markup=False), text)


def _class_table(labels: LabelSpace, pixels: np.ndarray, images: np.ndarray, title: str) -> None:
    console = Console(markup=False)  # names and paths may hold brackets
    console.print(title, soft_wrap=True, highlight=False)
    table = Table("label", "class", "pixels", "images")
    for column in (0, 2, 3):
        table.columns[column].justify = "right"
    classes = [value for value in range(len(labels.class_names)) if value != labels.ignore_label]
    total = max(1, int(pixels[classes].sum()))
    for value in (value for value in classes if pixels[value]):
        share = "< 0.01%" if pixels[value] < 1e-4 * total else f"{pixels[value] / total:.2%}"
        table.add_row(str(value), labels.class_names[value], share, f"{int(images[value]):,}")
    void = int(pixels[labels.ignore_label])
    table.add_row(str(labels.ignore_label), "(void)", f"{void / max(1, int(pixels.sum())):.2%} of all", "")
    console.print(table)
    absent = [labels.class_names[value] for value in classes if not pixels[value]]
    if absent:
        absent_classes = format_count(len(absent), "class", "classes")
        _warn(console, f"no pixel of {absent_classes}: {format_names(absent)}")
    if void > 0.5 * pixels.sum():
        _warn(console, "more than half of all pixels are void: is the void label right?")


def _warn(console: Console, text: str) -> None:
    console.print(f"note: {text}", soft_wrap=True, highlight=False)


def print_set(manifest: Manifest, sizes: Sequence[tuple[int, int]], images: np.ndarray, num_void: int) -> None:
    """Print what a finished set holds: classes, image sizes (height, width), bytes."""
    labels = LabelSpace(manifest.class_names, manifest.ignore_label)
    pixels = np.zeros(256, dtype=np.int64)
    pixels[: manifest.num_classes] = manifest.class_pixels
    pixels[manifest.ignore_label] = num_void
    counts = np.zeros(256, dtype=np.int64)
    counts[: manifest.num_classes] = images
    print_manifest(manifest)
    _class_table(labels, pixels, counts, f"set {manifest.split!r}, keys {manifest.keys_sha256[:12]}")
    middle = sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2]
    low, high = (tuple(f(size[axis] for size in sizes) for axis in (0, 1)) for f in (min, max))
    print(f"images (height x width): median {_by(middle)}, smallest sides {_by(low)}, largest {_by(high)}")


def print_repeats(manifest: Manifest, factors: RepeatFactors, *, threshold: float) -> None:
    """Print how often the images of each class come in an epoch with data.repeat_threshold."""
    console = Console(markup=False)
    table = Table("label", "class", "images", "share", "repeat factor")
    for column in (0, 2, 3, 4):
        table.columns[column].justify = "right"
    rows = zip(manifest.class_names, factors.images.tolist(), factors.classes.tolist(), strict=True)
    for label, (name, images, factor) in enumerate(rows):
        share = images / manifest.num_samples
        table.add_row(str(label), name, f"{images:,}", f"{share:.2%}", f"{factor:.2f}" if images else "")
    console.print(table)
    text = f"data.repeat_threshold={threshold:g}: {factors.describe(manifest.class_names)}"
    console.print(text, soft_wrap=True, highlight=False)
    if not manifest.classes:
        _warn(console, "training with it needs the file that `dist-deeplab shards add-classes` adds to this set")


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
