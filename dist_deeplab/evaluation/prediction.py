"""Images in, probabilities and classes out: batches of equal sizes, read ahead, large ones in windows."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from dist_deeplab.data.transforms import next_grid_size, pad_to
from dist_deeplab.data.windows import Windows
from dist_deeplab.evaluation.images import ImageError, Source, image_size, read_image
from dist_deeplab.evaluation.inference import Predictor
from dist_deeplab.evaluation.sliding import sliding_probabilities

_BATCHES_AHEAD = 3


class Prediction(NamedTuple):
    """An image uint8 [H, W, 3] and its probabilities float32 [C, H, W], or why there are none."""

    source: Source
    image: np.ndarray
    prob: np.ndarray
    problem: str = ""


def predict_images(
    predictor: Predictor,
    sources: Sequence[Source],
    *,
    device: torch.device,
    batch_size: int,
    windows: Windows,
    num_threads: int,
) -> Iterator[Prediction]:
    """Yield a prediction for each image, in an order that batches suit; images of one size go together.

    A file that can't be read gives a `problem` and no prediction, and stops nothing. `num_threads` read ahead.
    """
    with ThreadPoolExecutor(max(1, num_threads)) as readers:
        sizes = list(readers.map(_size_or_problem, sources))
        for source, size in zip(sources, sizes, strict=True):
            if isinstance(size, str):
                yield _failed(source, size)
        batches = _equal_batches(sources, sizes, batch_size, padded=predictor.align_corners)
        waiting: deque[list[tuple[Source, Future[np.ndarray | str]]]] = deque()
        for batch in [*batches, *[[]] * _BATCHES_AHEAD]:
            waiting.append([(source, readers.submit(_read_or_problem, source)) for source in batch])
            if len(waiting) > _BATCHES_AHEAD:
                done = [(source, future.result()) for source, future in waiting.popleft()]
                yield from (_failed(source, image) for source, image in done if isinstance(image, str))
                good = [(source, image) for source, image in done if not isinstance(image, str)]
                yield from _predict_batch(predictor, good, device, windows)


def _predict_batch(
    predictor: Predictor, batch: list[tuple[Source, np.ndarray]], device: torch.device, windows: Windows
) -> Iterator[Prediction]:
    large = [max(image.shape[:2]) > windows.side for _, image in batch]
    whole = [item for item, is_large in zip(batch, large) if not is_large]
    if whole:
        probs = probabilities(predictor, [image for _, image in whole], device)
        yield from (Prediction(source, image, prob) for (source, image), prob in zip(whole, probs, strict=True))
    for (source, image), is_large in zip(batch, large):
        if is_large:
            strips = sliding_probabilities(
                lambda part: probabilities(predictor, [part], device)[0],
                image,
                windows,
            )
            yield Prediction(source, image, np.concatenate(list(strips), axis=1))


def probabilities(predictor: Predictor, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
    """The probabilities, float32 [C, H, W], of images uint8 [H, W, 3] that are of one size when padded."""
    size = next_grid_size(images[0].shape[0]), next_grid_size(images[0].shape[1])
    padded = np.stack([pad_to(image, size, 0) for image in images])
    content = torch.tensor([image.shape[:2] for image in images])
    logits = predictor.logits(torch.from_numpy(padded).permute(0, 3, 1, 2).to(device), content)
    probs = logits.softmax(1).cpu().numpy()
    return [
        np.ascontiguousarray(prob[:, : image.shape[0], : image.shape[1]])
        for prob, image in zip(probs, images, strict=True)
    ]


def _equal_batches(
    sources: Sequence[Source], sizes: Sequence[tuple[int, int] | str], batch_size: int, *, padded: bool
) -> list[list[Source]]:
    groups: dict[tuple[int, int], list[Source]] = {}
    for source, size in zip(sources, sizes, strict=True):
        if not isinstance(size, str):
            key = (next_grid_size(size[0]), next_grid_size(size[1])) if padded else size
            groups.setdefault(key, []).append(source)
    return [group[at : at + batch_size] for group in groups.values() for at in range(0, len(group), batch_size)]


def _size_or_problem(source: Source) -> tuple[int, int] | str:
    try:
        return image_size(source.path)
    except ImageError as error:
        return str(error)


def _read_or_problem(source: Source) -> np.ndarray | str:
    try:
        return read_image(source.path)
    except ImageError as error:
        return str(error)


def _failed(source: Source, problem: str) -> Prediction:
    return Prediction(source, np.empty((0, 0, 3), np.uint8), np.empty((0, 0, 0), np.float32), problem)
