"""Loading of training samples, ours against the ways of others, on the same images and one core.

folder_pillow: a Dataset over files, Pillow decoding, scaling of the whole image, crop, mirror, float32 minus the mean
on the CPU (torchvision's references). folder_opencv: the same with OpenCV (kazuto1011's way). webdataset: a plain
pipeline over the shards, shuffled, then as folder_pillow. webdataset_ours: that pipeline with our decoding and
augmentation. ours: indexed access as training uses it, checksums and checks included; it ends in uint8, the device
normalises. ours_photometric: with data.photometric=true. decode: JPEG and label from memory to arrays and nothing else,
the limit.

--order full blocks: instead, what an epoch in each order asks of the storage (see reads.py).
"""

import argparse
import io
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from benchmarks import reads
from benchmarks.harness import Report, Row, interleave, ratio_column
from dist_deeplab.data.batch import collate, to_batch
from dist_deeplab.data.decode import decode_label, decode_packed
from dist_deeplab.data.loader import TrainDataset
from dist_deeplab.data.shards.manifest import Manifest, load_manifest
from dist_deeplab.data.shards.reader import ShardReader
from dist_deeplab.data.transforms import Augmentation
from dist_deeplab.errors import UserError
from dist_deeplab.logs import format_count

SUMMARY = "loading of training samples: samples/s of one core, time to the first batch, memory of a worker"
MEAN = np.array((122.67891434, 116.66876762, 104.00698793), dtype=np.float32)  # RGB, of the Caffe weights
SCALES, IGNORE = (0.5, 1.5), 255
_SHUFFLE = 200  # samples in webdataset's buffer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="MANIFEST", help="shards to load, e.g. data/voc/train.json")
    parser.add_argument(
        "--order", nargs="+", choices=("full", "blocks"), help="count opens, reads, bytes and downloads instead"
    )
    reads.add_arguments(parser)
    parser.add_argument("--crop", type=int, default=321, help="pixels; default: %(default)s")
    parser.add_argument("--images", type=int, default=200, help="images a round; default: %(default)s")
    parser.add_argument("--batch", type=int, default=10, help="images of a batch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each; default: %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    """The report of all competitors, or of the orders of --order."""
    if arguments.order:
        return reads.run(arguments)
    if not arguments.data:
        raise UserError("give the shards to load by --data, or --order full blocks for a drawn set")
    manifest = load_manifest(arguments.data)
    if arguments.images < arguments.batch:
        raise UserError("--images must be at least --batch")
    cv2.setNumThreads(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = unpack(manifest, Path(folder))
        makers = competitors(manifest, files, arguments.crop)
        num_batches = arguments.images // arguments.batch
        streams = {name: endless(make(), arguments.batch) for name, make in makers.items()}
        timed: dict[str, Callable[[], object]] = {
            name: lambda stream=stream: [next(stream) for _ in range(num_batches)]  # type: ignore[misc]
            for name, stream in streams.items()
        }
        raw = [ShardReader(manifest).read(i) for i in range(min(manifest.num_samples, arguments.images))]
        repeated = list(itertools.islice(itertools.cycle(raw), num_batches * arguments.batch))
        timed["decode"] = lambda: [(decode_packed(s.image), decode_label(s.label)) for s in repeated]
        timings = interleave(timed, rounds=arguments.rounds, clock=time.process_time)
        rows: list[Row] = []
        for name, timing in timings.items():
            row: Row = {"what": name, "samples_per_core_s": num_batches * arguments.batch / timing.median}
            row |= {"spread": timing.spread}
            first, memory = worker_costs(makers[name](), arguments.batch) if name in makers else (None, None)
            rows.append(row | {"first_batch_s": first, "worker_mib": memory})
    torch.set_num_threads(threads)
    for peer in ("folder_pillow", "folder_opencv", "webdataset", "decode"):
        ratio_column(rows, of="samples_per_core_s", to=peer, name=f"x_{peer}")
    notes = [
        "samples of one second of processor time, not of the clock: neighbours on the machine count less",
        f"{format_count(manifest.num_samples, 'image')}, crop {arguments.crop}, batches of {arguments.batch}; "
        "files in the page cache",
        "first_batch_s: from asking a DataLoader with one worker; worker_mib: what that worker has to itself by then",
    ]
    return Report("loading training samples", rows, notes)


def competitors(manifest: Manifest, files: list[tuple[str, str]], crop: int) -> dict[str, Callable[[], object]]:
    """{name: what makes its data set}."""
    augmentation = Augmentation(crop, SCALES, True, manifest.ignore_label)
    distorting = replace(augmentation, photometric=True)
    count = manifest.num_classes
    shards = [manifest.shard_name(number) for number in range(len(manifest.shards))]

    def ours(sample: dict[str, bytes]) -> object:
        image, label = decode_packed(sample["jpg"]), decode_label(sample["png"])
        return to_batch("key", *augmentation(image, label, np.random.random(4)))

    def usual(sample: dict[str, bytes]) -> object:
        return usual_transform(Image.open(io.BytesIO(sample["jpg"])), Image.open(io.BytesIO(sample["png"])), crop)

    return {
        "folder_pillow": lambda: Folder(files, pillow_sample, crop),
        "folder_opencv": lambda: Folder(files, opencv_sample, crop),
        "webdataset": lambda: Pipeline(shards, usual),
        "webdataset_ours": lambda: Pipeline(shards, ours),
        "ours": lambda: TrainDataset(manifest, num_classes=count, augmentation=augmentation, seed=0),
        "ours_photometric": lambda: TrainDataset(manifest, num_classes=count, augmentation=distorting, seed=0),
    }


class Folder(Dataset):
    """Pairs of files; what becomes of a pair is `load`."""

    def __init__(self, files: list[tuple[str, str]], load: Callable[[str, str, int], object], crop: int) -> None:
        self.files, self.load, self.crop = files, load, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> object:
        return self.load(*self.files[index % len(self.files)], self.crop)


class Pipeline(IterableDataset):
    """A plain webdataset pipeline that never ends."""

    def __init__(self, shards: list[str], load: Callable[[dict[str, bytes]], object]) -> None:
        self.shards, self.load = shards, load

    def __iter__(self) -> Iterator[object]:
        shuffled = webdataset.WebDataset(self.shards, shardshuffle=len(self.shards), empty_check=False)
        return iter(shuffled.repeat().shuffle(_SHUFFLE).map(self.load))


def pillow_sample(image: str, label: str, crop: int) -> object:
    """A sample as torchvision's references make it."""
    return usual_transform(Image.open(image), Image.open(label), crop)


def usual_transform(image: Image.Image, label: Image.Image, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the whole image, pad, crop, mirror; float32 minus the mean."""
    scale = random.uniform(*SCALES)
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    classes = np.asarray(label.resize(size, Image.Resampling.NEAREST))
    return finish(pixels.astype(np.float32) - MEAN, classes, crop)


def opencv_sample(image: str, label: str, crop: int) -> object:
    """A sample as kazuto1011's loader makes it."""
    decoded = cv2.imread(image, cv2.IMREAD_COLOR)
    assert decoded is not None, image
    pixels: np.ndarray = decoded.astype(np.float32)
    classes = np.asarray(Image.open(label), dtype=np.int32)
    scale = random.uniform(*SCALES)
    size = int(pixels.shape[1] * scale), int(pixels.shape[0] * scale)
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    resized = Image.fromarray(classes).resize(size, resample=Image.Resampling.NEAREST)
    return finish(pixels - MEAN[::-1], np.asarray(resized), crop)


def finish(pixels: np.ndarray, classes: np.ndarray, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad, crop, mirror and turn into tensors."""
    below, right = max(crop - pixels.shape[0], 0), max(crop - pixels.shape[1], 0)
    if below or right:
        pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(0, 0, 0))
        classes = np.pad(classes, ((0, below), (0, right)), constant_values=IGNORE)
    top, left = random.randint(0, pixels.shape[0] - crop), random.randint(0, pixels.shape[1] - crop)
    pixels = pixels[top : top + crop, left : left + crop]
    classes = classes[top : top + crop, left : left + crop]
    if random.random() < 0.5:
        pixels, classes = np.fliplr(pixels), np.fliplr(classes)
    return (
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        torch.from_numpy(np.ascontiguousarray(classes).astype(np.int64)),
    )


def batched(dataset: object) -> Callable[[list], object]:
    """How samples of a data set become a batch."""
    return lambda samples: collate(samples) if hasattr(samples[0], "image") else default_collate(samples)


def endless(dataset: object, size: int) -> Iterator[object]:
    """Yield batches in this process, in shuffled order, endlessly."""
    join = batched(dataset)
    if isinstance(dataset, IterableDataset):
        samples: Iterator[object] = iter(dataset)
    else:
        samples = (dataset[position] for position in itertools.count())  # type: ignore[index]
    while True:
        yield join([next(samples) for _ in range(size)])


def worker_costs(dataset: object, size: int) -> tuple[float, float | None]:
    """Seconds to the first batch of a DataLoader with one worker, and MiB that this worker has to itself."""
    options = {} if isinstance(dataset, IterableDataset) else {"sampler": range(4 * size)}
    started = time.perf_counter()
    batches = iter(
        DataLoader(dataset, batch_size=size, num_workers=1, collate_fn=batched(dataset), **options)  # type: ignore[arg-type]
    )
    next(batches)
    seconds = time.perf_counter() - started
    next(batches)
    memory = own_mib(batches._workers[0].pid)  # type: ignore[attr-defined]
    del batches
    return seconds, memory


def own_mib(pid: int) -> float | None:
    """MiB of memory that a process shares with no other; None where the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def unpack(manifest: Manifest, folder: Path) -> list[tuple[str, str]]:
    """Write the set's images and labels as files, and return their paths."""
    reader = ShardReader(manifest)
    files = []
    for index in range(manifest.num_samples):
        sample = reader.read(index)
        image, label = folder / f"{index}.jpg", folder / f"{index}.png"
        image.write_bytes(sample.image)
        label.write_bytes(sample.label)
        files.append((str(image), str(label)))
    return files
