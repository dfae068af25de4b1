"""Images in, classes out: batches of equal sizes, read ahead, large ones in windows.

`predict`, `evaluate` and serving all come to classes by these functions, so that one file has one mask.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dist_deeplab.data.image_file import DEFAULT, DecodeOptions
from dist_deeplab.data.transforms import next_grid_size, pad_to
from dist_deeplab.evaluation.images import ImageError, Source, image_size, read_image
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.evaluation.sliding import sliding_probabilities

_BATCHES_AHEAD = 3
_NO_PROBABILITIES = np.empty((0, 0, 0), np.float32)


class Prediction(NamedTuple):
    """An image uint8 [H, W, 3], its classes uint8 [H, W] and, where wanted, probabilities float32 [C, H, W]; or the
    problem why there are none."""

    source: Source
    image: np.ndarray
    pred: np.ndarray
    prob: np.ndarray = _NO_PROBABILITIES
    problem: str = ""


@dataclass(frozen=True)
class Workload:
    """How images go through a network: how many of one size at once, read by how many threads, what is returned."""

    device: torch.device
    batch_size: int = 1
    num_threads: int = 1
    with_probabilities: bool = False
    decoding: DecodeOptions = DEFAULT


def predict_images(predictor: Predictor, sources: Sequence[Source], work: Workload) -> Iterator[Prediction]:
    """Yield a prediction for each image, in an order that batches suit; images of one size go together.

    A file that can't be read gives a `problem` and no prediction, and stops nothing. An image in windows takes, beside
    itself, twice the probabilities of one row of windows (8 bytes x classes x window x width), and all probabilities
    (4 bytes x classes x pixels) only where they are wanted.
    """
    with ThreadPoolExecutor(max(1, work.num_threads)) as readers:
        sizes = list(readers.map(lambda source: _size_or_problem(source, work.decoding), sources))
        for source, size in zip(sources, sizes, strict=True):
            if isinstance(size, str):
                yield _failed(source, size)
        batches = _equal_batches(sources, sizes, predictor, work.batch_size)
        waiting: deque[list[tuple[Source, Future[np.ndarray | str]]]] = deque()
        for batch in [*batches, *[[]] * _BATCHES_AHEAD]:
            waiting.append([(source, readers.submit(_read_or_problem, source, work.decoding)) for source in batch])
            if len(waiting) > _BATCHES_AHEAD:
                done = [(source, future.result()) for source, future in waiting.popleft()]
                yield from (_failed(source, image) for source, image in done if isinstance(image, str))
                good = [(source, image) for source, image in done if not isinstance(image, str)]
                yield from _predict_batch(predictor, good, work)


def _predict_batch(
    predictor: Predictor, batch: list[tuple[Source, np.ndarray]], work: Workload
) -> Iterator[Prediction]:
    if not batch:
        return
    images = [image for _, image in batch]
    if predictor.windows.needed_for(images[0].shape):  # such images come one at a time
        ((source, image),) = batch
        if work.with_probabilities:
            prob = probabilities_of_one(predictor, image, work.device)
            yield Prediction(source, image, prob.argmax(0).astype(np.uint8), prob)
        else:
            yield Prediction(source, image, classes_of_one(predictor, image, work.device))
        return
    logits = padded_logits(predictor, images, work.device)
    preds = classes_of(logits).cpu().numpy()
    probs = logits.softmax(1).cpu().numpy() if work.with_probabilities else None
    for number, (source, image) in enumerate(batch):
        height, width = image.shape[:2]
        prob = _NO_PROBABILITIES if probs is None else np.ascontiguousarray(probs[number, :, :height, :width])
        yield Prediction(source, image, np.ascontiguousarray(preds[number, :height, :width]), prob)


def padded_logits(predictor: Predictor, images: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Logits, float32 [B, C, H, W] with their padding, of images uint8 [h, w, 3] that are of one size when padded."""
    size = next_grid_size(images[0].shape[0]), next_grid_size(images[0].shape[1])
    padded = np.stack([pad_to(image, size, 0) for image in images])
    content = torch.tensor([image.shape[:2] for image in images])
    return predictor.logits(torch.from_numpy(padded).permute(0, 3, 1, 2).to(device), content)


def classes_of(logits: torch.Tensor) -> torch.Tensor:
    """The classes of logits [B, C, H, W], uint8 [B, H, W]."""
    return logits.max(dim=1).indices.to(torch.uint8)  # argmax takes four times as long on a CPU


def probabilities(predictor: Predictor, image: np.ndarray, device: torch.device) -> np.ndarray:
    """The probabilities, float32 [C, H, W], of an image uint8 [H, W, 3] that is taken whole."""
    height, width = image.shape[:2]
    return padded_logits(predictor, [image], device).softmax(1)[0, :, :height, :width].cpu().numpy()


def probabilities_of_one(predictor: Predictor, image: np.ndarray, device: torch.device) -> np.ndarray:
    """The probabilities, float32 [C, H, W], of an image uint8 [H, W, 3], in windows where it is too large."""
    if not predictor.windows.needed_for(image.shape):
        return probabilities(predictor, image, device)
    return np.concatenate(list(_strips(predictor, image, device)), axis=1)


def classes_of_one(predictor: Predictor, image: np.ndarray, device: torch.device) -> np.ndarray:
    """The classes, uint8 [H, W], of an image uint8 [H, W, 3], in windows where it is too large."""
    if not predictor.windows.needed_for(image.shape):
        height, width = image.shape[:2]
        return classes_of(padded_logits(predictor, [image], device))[0, :height, :width].cpu().numpy()
    return np.concatenate([strip.argmax(0).astype(np.uint8) for strip in _strips(predictor, image, device)])


def _strips(predictor: Predictor, image: np.ndarray, device: torch.device) -> Iterator[np.ndarray]:
    return sliding_probabilities(lambda part: probabilities(predictor, part, device), image, predictor.windows)


def _equal_batches(
    sources: Sequence[Source], sizes: Sequence[tuple[int, int] | str], predictor: Predictor, batch_size: int
) -> list[list[Source]]:
    groups: dict[tuple[int, int], list[Source]] = {}
    large: list[list[Source]] = []
    for source, size in zip(sources, sizes, strict=True):
        if isinstance(size, str):
            continue
        if predictor.windows.needed_for(size):
            large.append([source])
            continue
        padded = (next_grid_size(size[0]), next_grid_size(size[1])) if predictor.align_corners else size
        groups.setdefault(padded, []).append(source)
    return [group[at : at + batch_size] for group in groups.values() for at in range(0, len(group), batch_size)] + large


def _size_or_problem(source: Source, decoding: DecodeOptions) -> tuple[int, int] | str:
    try:
        return image_size(source.path, decoding)
    except ImageError as error:
        return str(error)


def _read_or_problem(source: Source, decoding: DecodeOptions) -> np.ndarray | str:
    try:
        return read_image(source.path, decoding)
    except ImageError as error:
        return str(error)


def _failed(source: Source, problem: str) -> Prediction:
    return Prediction(source, np.empty((0, 0, 3), np.uint8), np.empty((0, 0), np.uint8), problem=problem)
